"use strict";
// The mask over a picture: what is painted is to be drawn anew. By pointer, or by keys: arrows move, the space bar paints.
function board(canvas, brush) {
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  let painting = false, painted = false, spot = null, last = null;

  function dab(x, y) {
    pen.fillStyle = "#ff4081";
    pen.beginPath();
    pen.arc(x, y, brush.value * canvas.width / 512, 0, 7);
    pen.fill();
    painted = true;
  }

  const at = e => { const r = canvas.getBoundingClientRect(); return [(e.clientX - r.left) * canvas.width / r.width, (e.clientY - r.top) * canvas.height / r.height]; };
  canvas.onpointerdown = e => { painting = true; canvas.setPointerCapture(e.pointerId); dab(...(last = at(e))); };
  canvas.onpointermove = e => {
    if (!painting) return;
    const to = at(e), steps = Math.ceil(Math.hypot(to[0] - last[0], to[1] - last[1]) / 3) || 1;
    for (let k = 1; k <= steps; k++) dab(last[0] + (to[0] - last[0]) * k / steps, last[1] + (to[1] - last[1]) * k / steps);
    last = to;
  };
  canvas.onpointerup = canvas.onpointercancel = () => { painting = false; };
  canvas.onkeydown = e => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[e.key], step = canvas.width / 16;
    spot ||= [canvas.width / 2, canvas.height / 2];
    if (move) spot = spot.map((v, k) => Math.min(Math.max(v + step * move[k], 0), k ? canvas.height : canvas.width));
    else if (e.key === " ") dab(...spot); else return;
    e.preventDefault();
  };

  const wipe = () => { pen.clearRect(0, 0, canvas.width, canvas.height); painted = false; };
  return {
    wipe,
    // Of another picture: nothing is painted on it yet.
    size(width, height) { Object.assign(canvas, { width, height }); wipe(); spot = null; },
    // White where it is painted, black elsewhere, as the address of a PNG; "" where nothing is.
    image() {
      if (!painted) return "";
      const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
      const pixels = pen.getImageData(0, 0, canvas.width, canvas.height);
      for (let k = 0; k < pixels.data.length; k += 4) { const on = pixels.data[k + 3] > 127 ? 255 : 0; pixels.data.set([on, on, on, 255], k); }
      copy.getContext("2d").putImageData(pixels, 0, 0);
      return copy.toDataURL("image/png");
    },
  };
}
