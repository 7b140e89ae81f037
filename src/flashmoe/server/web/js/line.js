// A small line of the last values.

const KEPT = 120; // 30 s

/** Draws on a canvas, in the canvas's own text colour. */
export class Line {
  constructor(canvas) {
    this.canvas = canvas;
    this.values = [];
  }

  /** One more value. */
  push(value) {
    this.values = [...this.values, value].slice(-KEPT);
    this.draw();
  }

  /** Draw all. */
  draw() {
    const { canvas, values } = this;
    const scale = devicePixelRatio;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    canvas.width = width * scale;
    canvas.height = height * scale;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    const most = Math.max(...values, 1e-9);
    const x = (i) => width - ((values.length - 1 - i) * width) / (KEPT - 1);
    const y = (value) => height - 1 - (value / most) * (height - 3);
    context.beginPath();
    values.forEach((value, i) => context.lineTo(x(i), y(value)));
    context.strokeStyle = context.fillStyle = getComputedStyle(canvas).color;
    context.lineWidth = 1.5;
    context.stroke();
    context.lineTo(width, height);
    context.lineTo(x(0), height);
    context.globalAlpha = 0.14;
    context.fill();
  }
}
