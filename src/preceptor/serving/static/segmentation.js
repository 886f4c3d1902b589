/** Segmentation of a case from any of its contrasts, with volumes, expected Dice and a viewer. */

import { post, request } from "./api.js";
import { caseFiles } from "./case_files.js";
import { element, onSlide, onSubmit, taskRunner } from "./dom.js";
import { colorOf, openViewer } from "./viewer.js";

/**
 * @param {HTMLElement} section
 * @param {Object[]} models Descriptions of the models, from /v1/models.
 */
export function start(section, models) {
  const find = (selector) => section.querySelector(selector);
  const form = find("form");
  const panel = find(".case");
  const imageSelect = find("#shown-contrast");
  const run = taskRunner({ message: find("#case-message") });
  const canvas = find("canvas");
  let model, takeFiles, viewer, current, mask; // `model` is the chosen one, `current.model` that of the case

  find("#segmentation-model").addEventListener("change", chooseModel);
  find("#shown-view").addEventListener("change", () => viewer?.setView(Number(find("#shown-view").value)));
  onSlide(find("#mask-opacity"), (share) => viewer?.setOpacity(share));
  imageSelect.addEventListener("change", () => run("Loading the image …", (signal) => view(signal)));
  chooseModel();

  function chooseModel() {
    model = models.find(({ name }) => name === find("#segmentation-model").value);
    takeFiles = caseFiles(form, model.modalities);
    run.abort();
    panel.hidden = true;
  }

  onSubmit(form, "Uploading and segmenting …", async (signal) => {
    panel.hidden = true;
    const { data, unused } = takeFiles();
    const asked = model;
    data.set("model", asked.name);
    const result = await post("/v1/segment", data, signal);
    current = { id: result.case, model: asked, images: new Map() };
    find(".contrasts").replaceChildren(find(".contrasts legend"), ...result.available.map(checkbox));
    imageSelect.replaceChildren(...result.available.map((name) => new Option(name)));
    showNumbers(result);
    panel.hidden = false;
    run("Loading the image …", async (shown) => {
      await newMask(result, shown);
      return view(shown);
    });
    const ignored = unused ? ` Not used, because they are no images by their names: ${unused} of the files.` : "";
    return `Segmented from ${result.available.join(", ")}.${ignored}`;
  });

  function checkbox(name) {
    const input = element("input", { type: "checkbox", value: name, checked: true });
    input.addEventListener("change", segmentAgain);
    return element("label", { className: "check" }, input, name);
  }

  function segmentAgain() {
    const chosen = [...section.querySelectorAll(".contrasts input:checked")].map(({ value }) => value);
    markStale(true);
    run("Segmenting …", async (signal) => {
      if (!chosen.length) throw new Error("choose at least one contrast");
      const data = new FormData();
      const fields = { case: current.id, modalities: chosen.join("+"), model: current.model.name };
      for (const [name, value] of Object.entries(fields)) data.set(name, value);
      const result = await post("/v1/segment", data, signal);
      showNumbers(result);
      await newMask(result, signal);
      return view(signal);
    });
  }

  async function newMask(result, signal) {
    mask = await (await request(result.mask, { signal })).blob();
    const link = find(".download");
    URL.revokeObjectURL(link.href);
    link.href = URL.createObjectURL(mask);
  }

  /** Show the chosen image with the mask. Returns the sentence for the live region. */
  async function view(signal) {
    const name = imageSelect.value;
    const { id, images, model: asked } = current;
    if (!images.has(name)) {
      images.set(name, await (await request(`/v1/cases/${id}/${encodeURIComponent(name)}`, { signal })).blob());
    }
    viewer ??= await openViewer(canvas);
    viewer.setOpacity(find("#mask-opacity").value / 100);
    await viewer.show(images.get(name), mask, labelsOf(asked), signal);
    canvas.dataset.shown = name;
    return "";
  }

  function showNumbers({
    modalities,
    volumes_ml: volumes,
    expected_dice: expected,
    expected_dice_of_all: all,
    validation_cases: cases,
    warnings,
  }) {
    const dice = (values, region) => (values ? values[region].toFixed(3) : "unknown");
    const millilitres = (ml) => (ml === 0 || ml >= 0.1 ? ml.toFixed(2) : String(Number(ml.toPrecision(2))));
    const used = modalities.split("+").join(", ");
    const caption = `Mask from ${used}. Expected Dice: mean over ${cases} validation cases with these contrasts, and with all.`;
    find(".volumes caption").replaceChildren(element("span", { textContent: caption }));
    find(".volumes tbody").replaceChildren(
      ...current.model.regions.map((region) => {
        const cells = [millilitres(volumes[region]), dice(expected, region), dice(all, region)];
        const head = element("th", { scope: "row" }, region, " ", ...current.model.labels[region].map(chip));
        const row = element("tr", {}, head, ...cells.map((textContent) => element("td", { textContent })));
        row.dataset.region = region;
        return row;
      }),
    );
    find(".warnings").replaceChildren(...warnings.map((textContent) => element("li", { textContent })));
    markStale(false);
  }

  /** Dim the numbers and the mask of contrasts that are no longer chosen. */
  function markStale(stale) {
    for (const selector of [".volumes", ".canvas"]) find(selector).classList.toggle("waiting", stale);
  }

  function chip(value) {
    const made = element("i", { className: "chip", title: `label ${value}` });
    made.style.background = colorOf(value, labelsOf(current.model));
    return made;
  }
}

/** Return the values of the masks of a model in ascending order. */
function labelsOf(model) {
  return [...new Set(Object.values(model.labels).flat())].sort((a, b) => a - b);
}
