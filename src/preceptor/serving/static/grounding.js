/** Answers in words with boxes on the image. */

import { askModels, element, percent } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const NAMES = { ct: "CT", mr: "MR", pet: "PET", x: "X-ray" };

/**
 * @param {HTMLElement} section
 * @param {Object[]} models Descriptions of the models, from /v1/models.
 */
export function start(section, models) {
  const guided = models.find((model) => model.needs_modality);
  if (guided) {
    const select = section.querySelector("[name=modality]");
    select.append(...guided.modalities.map((value) => new Option(NAMES[value] ?? value, value)));
    select.required = true;
    select.parentElement.hidden = false;
  }

  askModels(
    section,
    "/v1/ask",
    { picture: true },
    ({ answers: [best], boxes, picture, unreadable_boxes: unreadable }) => [
      element(
        "div",
        { className: "layers" },
        element("img", { src: picture, alt: "The image as the model reads it" }),
        drawing(boxes),
      ),
      element("p", { className: "text", textContent: best.answer || "(no words)" }),
      element("p", { className: "small", textContent: summary(best, boxes, unreadable) }),
      element("ol", { className: "small boxes" }, ...boxes.map((box) => element("li", { textContent: describe(box) }))),
    ],
  );
}

/** Return an SVG over the image. Percentages keep boxes in place and texts in shape at every size. */
function drawing(boxes) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("aria-hidden", "true"); // the list below says the same
  const add = (tag, attributes, text = "") => {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.textContent = text;
    svg.append(made);
  };
  boxes.forEach(([x1, y1, x2, y2], i) => {
    const place = { x: `${x1 / 10}%`, y: `${y1 / 10}%`, width: `${(x2 - x1) / 10}%`, height: `${(y2 - y1) / 10}%` };
    add("rect", { ...place, class: "halo" });
    add("rect", { ...place, class: "box" });
    add("text", { x: `${x1 / 10}%`, y: `${y1 / 10}%`, dx: 6, dy: 18 }, String(i + 1));
  });
  return svg;
}

function summary({ probability }, boxes, unreadable = 0) {
  const count = boxes.length === 1 ? "1 box" : `${boxes.length || "no"} boxes`;
  const broken = unreadable ? `; ${unreadable} more cannot be read` : "";
  return `Mean probability of the words ${percent(probability)}; ${count}${broken}.`;
}

function describe([x1, y1, x2, y2]) {
  return `from ${x1 / 10} % to ${x2 / 10} % of the width, ${y1 / 10} % to ${y2 / 10} % of the height`;
}
