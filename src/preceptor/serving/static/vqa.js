/** Answers with probabilities, and the activation map over the image. */

import { askModels, element, onSlide, percent } from "./dom.js";

/** @param {HTMLElement} section */
export function start(section) {
  let opacity = 1;
  onSlide(section.querySelector("#vqa-opacity"), (share) => {
    opacity = share;
    for (const map of section.querySelectorAll(".map")) map.style.opacity = share;
  });

  const fields = { top: 5, heatmap: true, picture: true };
  askModels(section, "/v1/answer", fields, ({ answers, warnings, heatmap, picture }) => {
    const map = element("img", { className: "map", src: heatmap, alt: `Activation map of ${answers[0].answer}` });
    map.style.opacity = opacity;
    return [
      element(
        "div",
        { className: "layers" },
        element("img", { src: picture, alt: "The image as the model reads it" }),
        map,
      ),
      element("figure", { className: "bars" }, element("dl", {}, ...answers.map(bar))),
      element("ul", { className: "warnings small" }, ...warnings.map((textContent) => element("li", { textContent }))),
    ];
  });
}

function bar({ answer, probability }) {
  const fill = element("i", { className: "fill" });
  fill.style.width = `${100 * probability}%`;
  const track = element("span", { className: "track" }, fill);
  return element(
    "div",
    {},
    element("dt", { textContent: answer }),
    element("dd", {}, track, element("b", { textContent: percent(probability) })),
  );
}
