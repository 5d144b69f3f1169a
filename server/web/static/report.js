// The report that `octavo quantize` wrote beside the model, in a frame with an origin of its own, which can reach nothing.
import { byId, el } from "./dom.js";
import { own } from "./server.js";

const NONE =
  "There is none: octavo did not quantize this model, or the report is not beside it. `octavo quantize` writes one, with what every layer lost.";

export class ReportView {
  constructor(onError) {
    this.onError = onError;
    this.text = null;
    byId("report-save").addEventListener("click", () => this.save());
  }

  async show() {
    if (this.text !== null) return;
    const none = byId("report-none");
    none.textContent = "Asking for the report …";
    try {
      if (!(await own.json("server_info")).quantization_report) {
        none.textContent = NONE;
        return;
      }
      this.text = await (await own.ask("quantization_report")).text();
    } catch (error) {
      none.textContent = "";
      this.onError(error);
      return;
    }
    none.textContent = "";
    byId("report-save").hidden = false;
    const frame = el("iframe", { class: "report", title: "The quantization report", sandbox: "allow-scripts", src: new URL("ui/report-frame.html", own.base).href });
    frame.addEventListener("load", () => frame.contentWindow.postMessage(this.text, "*"));
    byId("report-place").replaceChildren(frame);
  }

  save() {
    const url = URL.createObjectURL(new Blob([this.text], { type: "text/html" }));
    el("a", { href: url, download: "quantization_report.html" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }
}
