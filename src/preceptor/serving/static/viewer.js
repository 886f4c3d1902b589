/** The viewer of a volume and its mask: NiiVue, loaded when it is first needed. */

const LABEL_COLORS = ["#e6493f", "#3f97f0", "#3cc882", "#f0be3c", "#be78f0", "#9fb4c4"];
const STEP = 5; // degrees per key press in the 3-D view
const MOVES = {
  ArrowLeft: [-1, 0, 0],
  ArrowRight: [1, 0, 0],
  ArrowDown: [0, -1, 0],
  ArrowUp: [0, 1, 0],
  PageDown: [0, 0, -1],
  PageUp: [0, 0, 1],
};

/**
 * Open a viewer.
 *
 * @param {HTMLCanvasElement} canvas
 * @returns {Promise<{show: Function, setView: Function, setOpacity: Function}>}
 * @throws {Error} The browser has no WebGL 2.
 */
export async function openViewer(canvas) {
  if (!document.createElement("canvas").getContext("webgl2")) {
    throw new Error("this browser has no WebGL 2, so images cannot be shown; the mask can be downloaded");
  }
  const { MULTIPLANAR_TYPE, Niivue, NVImage, SHOW_RENDER, SLICE_TYPE } = await import("./vendor/niivue/niivue.js");
  const niivue = new Niivue({
    logLevel: "error",
    dragAndDropEnabled: false,
    backColor: [0, 0, 0, 1],
    crosshairColor: [0.4, 0.85, 0.8, 0.8],
    crosshairWidth: 0.3,
    crosshairWidthUnit: "percent",
    fontColor: [1, 1, 1, 1],
    multiplanarShowRender: SHOW_RENDER.ALWAYS,
    multiplanarLayout: MULTIPLANAR_TYPE.GRID,
    multiplanarPadPixels: 4,
    isRadiologicalConvention: true,
    loadingText: "",
  });
  await niivue.attachToCanvas(canvas);
  // In the capture phase, because single letters are hot keys of NiiVue.
  for (const type of ["keydown", "keyup"]) canvas.parentElement.addEventListener(type, useKey, { capture: true });

  function useKey(event) {
    event.stopPropagation();
    const move = MOVES[event.key];
    if (!move || !niivue.volumes.length) return;
    event.preventDefault();
    if (event.type === "keyup") return;
    const { renderAzimuth, renderElevation } = niivue.scene;
    if (niivue.opts.sliceType !== SLICE_TYPE.RENDER) niivue.moveCrosshairInVox(...move);
    else niivue.setRenderAzimuthElevation(renderAzimuth + STEP * move[0], renderElevation + STEP * move[1]);
  }

  let opacity = 0.5;

  /**
   * Show a volume and a mask in place of the last ones.
   *
   * @param {Blob} image
   * @param {Blob} mask
   * @param {number[]} labels Values of the mask.
   * @param {AbortSignal} signal
   */
  async function show(image, mask, labels, signal) {
    const load = (blob, name) => NVImage.loadFromFile({ file: new File([blob], name), name });
    const [shown, overlay] = await Promise.all([load(image, "image.nii.gz"), load(mask, "mask.nii.gz")]);
    signal.throwIfAborted(); // another case or contrast was chosen meanwhile
    overlay.setColormapLabel(colormapOf(labels));
    overlay.opacity = opacity;
    while (niivue.volumes.length) niivue.removeVolumeByIndex(niivue.volumes.length - 1);
    niivue.addVolume(shown);
    niivue.addVolume(overlay);
  }

  function setOpacity(share) {
    opacity = share;
    if (niivue.volumes.length > 1) niivue.setOpacity(1, share);
  }

  return { show, setOpacity, setView: (type) => niivue.setSliceType(type) };
}

/** Return the colour of a value among the values of a mask. */
export const colorOf = (value, labels) => LABEL_COLORS[labels.indexOf(value) % LABEL_COLORS.length];

function colormapOf(labels) {
  const channel = (i) => [
    0,
    ...labels.map((value) => parseInt(colorOf(value, labels).slice(1 + 2 * i, 3 + 2 * i), 16)),
  ];
  return {
    R: channel(0),
    G: channel(1),
    B: channel(2),
    A: [0, ...labels.map(() => 255)],
    I: [0, ...labels],
    labels: ["", ...labels.map((value) => `label ${value}`)],
  };
}
