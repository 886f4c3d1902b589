/** Start the page: ask for the token, wait until the models are loaded, start the section of each task. */

import { request, setToken } from "./api.js";
import { onSubmit, say } from "./dom.js";
import * as grounding from "./grounding.js";
import * as segmentation from "./segmentation.js";
import * as vqa from "./vqa.js";

const SECTIONS = { vqa, grounding, segmentation };
const POLL_MS = 500;

/** Return the descriptions of the models, after the user gave the token if there is one. */
function describeModels() {
  const form = document.querySelector("#token");
  const get = async (signal) => (await request("/v1/models", { signal })).json();
  if (!form) return get();
  return new Promise((resolve) => {
    onSubmit(form, "Checking the token …", async (signal) => {
      setToken(form.querySelector("input").value);
      resolve(await get(signal));
      form.closest("section").hidden = true;
      document.querySelector("#state").focus();
      return "";
    });
  });
}

/** Wait until loading has ended, for each model with success or an error. */
async function loadingEnds() {
  for (;;) {
    const { status } = await (await fetch("/healthz")).json();
    if (status !== "loading") return;
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

/** Remove a model that cannot be loaded from its section. */
function remove({ name, task }) {
  const section = document.querySelector(`section[data-task=${task}]`);
  const ofModel = (place) => place.dataset.model === name || (place.tagName === "OPTION" && place.value === name);
  for (const place of [...section.querySelectorAll("[data-model], option")].filter(ofModel)) place.remove();
}

async function main() {
  const state = document.querySelector("#state");
  try {
    await loadingEnds();
    if (document.querySelector("#token")) say(state, "The models are loaded. Enter the token to use them.");
    const described = (await describeModels()).models;
    const failed = described.filter((model) => model.failed);
    const models = described.filter((model) => !model.failed);
    failed.forEach(remove);
    for (const section of document.querySelectorAll("section[data-task]")) {
      const mine = models.filter((model) => model.task === section.dataset.task);
      section.hidden = document.querySelector(`nav a[href="#${section.id}"]`).hidden = !mine.length;
      if (!mine.length) continue;
      SECTIONS[section.dataset.task].start(section, mine);
      section.querySelector("fieldset").disabled = false;
    }
    const names = (some) => some.map(({ name }) => name).join(", ");
    const served = models.length ? `${models.length === 1 ? "Model" : "Models"}: ${names(models)}` : "";
    const why = failed.length ? `Not loaded: ${names(failed)}; the log of the server says why.` : "";
    say(state, [served, why].filter(Boolean).join(". "), failed.length > 0);
  } catch (error) {
    say(state, error.message, true);
  }
}

main();
