/** Helpers for elements, forms, dropped files and sliders. */

import { post } from "./api.js";

/**
 * Return a new element.
 *
 * @param {string} tag
 * @param {Object} [properties] Properties of the element, such as className and textContent.
 * @param {...(Node|string)} children
 */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** Show a sentence in a live region; screen readers read it. */
export function say(region, sentence, isError = false) {
  region.classList.toggle("error", isError);
  region.textContent = sentence;
}

/** Return a share in [0, 1] as a percentage. */
export const percent = (share) => `${(100 * share).toFixed(1)} %`;

/**
 * Run tasks one at a time: a new task, or the cancel button, aborts the one that runs.
 *
 * @param {{message: HTMLElement, cancel?: HTMLElement}} elements Live region and cancel button.
 * @returns {(waiting: string, task: (signal: AbortSignal) => Promise<string>) => Promise<void>} Function that runs a
 *   task. It shows `waiting`, then the sentence of the task or its error. Its method `abort` aborts the task that runs.
 */
export function taskRunner({ message, cancel }) {
  let running = null;
  const run = async (waiting, task) => {
    running?.abort();
    const controller = (running = new AbortController());
    if (cancel) cancel.hidden = false;
    say(message, waiting);
    let outcome;
    try {
      outcome = [await task(controller.signal), false];
    } catch (error) {
      outcome = error.name === "AbortError" ? ["Cancelled.", false] : [error.message, true];
    }
    if (running !== controller) return; // a newer task speaks
    running = null;
    if (cancel) {
      if (cancel === document.activeElement) cancel.previousElementSibling.focus();
      cancel.hidden = true;
    }
    say(message, ...outcome);
  };
  run.abort = () => running?.abort();
  cancel?.addEventListener("click", run.abort);
  return run;
}

/**
 * Run a task when a form is submitted; see `taskRunner`. A change of the form aborts it: its answer would be shown
 * below other inputs than it belongs to.
 *
 * @param {HTMLFormElement} form Form with a live region `.message` and a button `.cancel`.
 * @param {string} waiting
 * @param {(signal: AbortSignal) => Promise<string>} task
 */
export function onSubmit(form, waiting, task) {
  const run = taskRunner({ message: form.querySelector(".message"), cancel: form.querySelector(".cancel") });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run(waiting, task);
  });
  form.addEventListener("input", run.abort);
}

/** Call `use` with the DataTransfer of what is dropped on an element. */
export function onDrop(zone, use) {
  const mark = (on) => zone.classList.toggle("over", on);
  zone.addEventListener("dragover", (event) => {
    event.preventDefault();
    mark(true);
  });
  zone.addEventListener("dragleave", () => mark(false));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    mark(false);
    use(event.dataTransfer);
  });
}

/** Let a file be dropped on the image input of a form, and show the chosen image if the browser can. */
export function imageInput(form) {
  const zone = form.querySelector(".drop");
  const input = zone.querySelector("input");
  const preview = zone.querySelector(".preview");
  onDrop(zone, ({ files }) => {
    if (!files.length) return;
    const one = new DataTransfer();
    one.items.add(files[0]);
    input.files = one.files;
    for (const type of ["input", "change"]) input.dispatchEvent(new Event(type, { bubbles: true }));
  });
  preview.addEventListener("load", () => (preview.hidden = false));
  input.addEventListener("change", () => {
    URL.revokeObjectURL(preview.src);
    preview.hidden = true; // of DICOM and TIFF, the picture comes with the answer
    if (input.files.length) preview.src = URL.createObjectURL(input.files[0]);
    else preview.removeAttribute("src");
  });
}

/** Call `use` with the share in [0, 1] of a slider, now and when it moves; show it as percentage. */
export function onSlide(input, use) {
  const update = () => {
    input.nextElementSibling.textContent = `${input.value} %`;
    use(input.value / 100);
  };
  input.addEventListener("input", update);
  update();
}

/**
 * Ask every model of a section, each in its own column.
 *
 * @param {HTMLElement} section
 * @param {string} path Path of the API.
 * @param {Object} fields Further fields of the form.
 * @param {(answer: Object) => Node[]} show Function that returns the contents of a column.
 */
export function askModels(section, path, fields, show) {
  const form = section.querySelector("form");
  const columns = section.querySelector(".columns");
  imageInput(form);
  onSubmit(form, "Waiting for the answer …", async (signal) => {
    columns.classList.add("waiting");
    try {
      const articles = [...columns.querySelectorAll("article")];
      const answers = await Promise.all(
        articles.map(({ dataset }) => {
          const data = new FormData(form);
          for (const [name, value] of Object.entries({ ...fields, model: dataset.model })) data.set(name, value);
          return post(path, data, signal);
        }),
      );
      articles.forEach((article, i) => article.querySelector(".answer").replaceChildren(...show(answers[i])));
      for (const hidden of section.querySelectorAll(":scope > [hidden]")) hidden.hidden = false;
      return articles.map(({ dataset }, i) => `${dataset.model}: ${answers[i].answers[0].answer}`).join("; ");
    } catch (error) {
      columns.hidden = true; // an old answer must not stand below a new question
      throw error;
    } finally {
      columns.classList.remove("waiting");
    }
  });
}
