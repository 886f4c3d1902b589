/** The viewer of a volume and its mask: NiiVue, loaded when it is first needed. */

export const LABEL_COLORS = ["#e6493f", "#3f97f0", "#3cc882", "#f0be3c", "#be78f0", "#9fb4c4"];
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
 * @param {number[]} labels Values of the mask, in the order of `LABEL_COLORS`.
 * @returns {Promise<{show: Function, setView: Function, setOpacity: Function}>}
 * @throws {Error} The browser has no WebGL 2.
 */
export async function openViewer(canvas, labels) {
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

  const rgb = labels.map((_, i) => LABEL_COLORS[i % LABEL_COLORS.length].match(/[0-9a-f]{2}/g).map((hex) => parseInt(hex, 16)));
  const colormap = {
    R: [0, ...rgb.map(([red]) => red)],
    G: [0, ...rgb.map(([, green]) => green)],
    B: [0, ...rgb.map(([, , blue]) => blue)],
    A: [0, ...labels.map(() => 255)],
    I: [0, ...labels],
    labels: ["", ...labels.map((value) => `label ${value}`)],
  };
  let opacity = 0.5;

  /**
   * Show a volume and a mask in place of the last ones.
   *
   * @param {Blob} image
   * @param {Blob} mask
   */
  async function show(image, mask) {
    const load = (blob, name) => NVImage.loadFromFile({ file: new File([blob], name), name });
    const [shown, overlay] = await Promise.all([load(image, "image.nii.gz"), load(mask, "mask.nii.gz")]);
    overlay.setColormapLabel(colormap);
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
