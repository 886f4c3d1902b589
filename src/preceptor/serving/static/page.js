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

/** Wait until the models are loaded. Throws an error if one cannot be loaded. */
async function loaded() {
  for (;;) {
    const { status } = await (await fetch("/healthz")).json();
    if (status === "ready") return;
    if (status === "failed") throw new Error("A model cannot be loaded; the log of the server says why.");
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

async function main() {
  const state = document.querySelector("#state");
  try {
    await loaded();
    if (document.querySelector("#token")) say(state, "The models are loaded. Enter the token to use them.");
    const { models } = await describeModels();
    for (const section of document.querySelectorAll("section[data-task]")) {
      const { task } = section.dataset;
      SECTIONS[task].start(
        section,
        models.filter((model) => model.task === task),
      );
      section.querySelector("fieldset").disabled = false;
    }
    const names = models.map(({ name }) => name).join(", ");
    say(state, `${models.length === 1 ? "Model" : "Models"}: ${names}`);
  } catch (error) {
    say(state, error.message, true);
  }
}

main();
