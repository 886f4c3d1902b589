/** The files of a case: which files are the volume of which contrast. The user decides; names only preselect. */

import { element, onDrop } from "./dom.js";

const NIFTI = /\.nii(\.gz)?$/i;

/**
 * @typedef {{name: string, files: File[], guess: string}} Volume A NIfTI file or the files of a folder; `guess` is the
 *   contrast that its name says, or empty.
 */

/**
 * Build the inputs of a form for the contrasts of a model.
 *
 * @param {HTMLFormElement} form
 * @param {string[]} contrasts
 * @returns {() => {data: FormData, unused: number}} Function that returns the chosen files by contrast, and the number
 *   of files that are no images by their names. It throws an error if there are none or a contrast has two volumes.
 */
export function caseFiles(form, contrasts) {
  const single = form.querySelector(".contrast-files");
  const found = form.querySelector(".found");
  const endings = found.dataset.otherEndings.split(" ");
  /** Return whether a file is no image by its name: the reader of the server ignores it in a series. */
  const isOther = ({ name }) => !NIFTI.test(name) && endings.some((ending) => name.toLowerCase().endsWith(ending));
  let volumes = [];
  let others = 0;

  const inputs = contrasts.map((name) => element("input", { type: "file", multiple: true, id: `file-${name}`, name }));
  single.replaceChildren(
    single.querySelector("legend"),
    ...inputs.map((input) =>
      element("div", { className: "field" }, element("label", { htmlFor: input.id, textContent: input.name }), input),
    ),
  );
  show([]);

  function show(entries) {
    const images = entries.filter(({ file }) => !isOther(file));
    others = entries.length - images.length;
    volumes = toVolumes(images, contrasts);
    found.replaceChildren(
      ...(volumes.length ? [element("p", { className: "small", textContent: "Check the contrast of each:" })] : []),
    );
    volumes.forEach((volume, i) => {
      const select = element("select", { id: `volume-${i}` }, new Option("not used", ""));
      select.append(...contrasts.map((name) => new Option(name, name)));
      select.value = volume.guess;
      const title = volume.files.length > 1 ? `${volume.name} (${volume.files.length} files)` : volume.name;
      const hint = element("span", { className: "small", textContent: volume.guess ? "by its name" : "" });
      select.addEventListener("change", () => (hint.textContent = ""));
      found.append(
        element(
          "div",
          { className: "volume" },
          element("label", { htmlFor: select.id, textContent: title }),
          select,
          hint,
        ),
      );
    });
  }

  for (const id of ["#segmentation-files", "#segmentation-folder"]) {
    const input = form.querySelector(id);
    input.value = "";
    input.onchange = () => show([...input.files].map((file) => ({ file, path: file.webkitRelativePath || file.name })));
  }
  const zone = form.querySelector(".drop");
  if (!zone.dataset.ready) {
    onDrop(zone, async (transfer) => {
      zone.dispatchEvent(new Event("input", { bubbles: true }));
      zone.show(await droppedFiles(transfer));
    });
  }
  zone.dataset.ready = "yes";
  zone.show = show;

  return () => {
    const data = new FormData();
    let unused = others;
    const add = (name, files) => {
      if (data.has(name)) throw new Error(`two volumes are given for ${name}; choose one`);
      for (const file of files) data.append(name, file, "volume"); // the server needs no names
    };
    for (const input of inputs) {
      const images = [...input.files].filter((file) => input.files.length === 1 || !isOther(file));
      unused += input.files.length - images.length;
      if (images.length) add(input.name, images);
    }
    volumes.forEach(({ files }, i) => {
      const contrast = form.querySelector(`#volume-${i}`).value;
      if (contrast) add(contrast, files);
    });
    if (![...data.keys()].length) throw new Error(`give the files of at least one contrast: ${contrasts.join(", ")}`);
    return { data, unused };
  };
}

/** Group files into volumes: each NIfTI file is one, and all other files of a folder are one (a DICOM series). */
function toVolumes(entries, contrasts) {
  const groups = new Map();
  for (const { file, path } of entries) {
    if (file.name.startsWith(".")) continue;
    const folder = path.split("/").slice(0, -1).join("/");
    const key = NIFTI.test(file.name) ? path : folder;
    groups.set(key, [...(groups.get(key) ?? []), file]);
  }
  const volumes = [...groups].map(([key, files]) => {
    const name = key.split("/").pop() || (files.length === 1 ? files[0].name : "DICOM files");
    return { name, files, guess: guessContrast(name, contrasts) };
  });
  const guesses = volumes.map(({ guess }) => guess);
  for (const volume of volumes) if (guesses.filter((guess) => guess === volume.guess).length > 1) volume.guess = "";
  return volumes;
}

/** Return the contrast that is a word of a name, or an empty string if none or several are. */
function guessContrast(name, contrasts) {
  const words = name.toLowerCase().split(/[^a-z0-9]+/);
  const there = contrasts.filter((contrast) => words.includes(contrast.toLowerCase()));
  return there.length === 1 ? there[0] : "";
}

/** Return the files of a drop with their paths, also those in dropped folders. */
async function droppedFiles(transfer) {
  const entries = [];
  const visit = async (entry) => {
    if (entry.isFile) {
      const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
      entries.push({ file, path: entry.fullPath.slice(1) });
      return;
    }
    const reader = entry.createReader();
    for (;;) {
      const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!some.length) return;
      for (const child of some) await visit(child);
    }
  };
  // All entries are taken before the first `await`: the browser empties the list then.
  for (const entry of [...transfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean)) await visit(entry);
  return entries;
}
