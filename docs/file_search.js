// A page that is opened from a folder may start no worker: the search runs in a hidden frame then.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      const answer = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      frame.hidden = true;
      frame.answer = answer;
      frame.srcdoc =
        "<script>window.postMessage = (data) => window.frameElement.answer(data)</script>" +
        `<script src="${url}"></script>`;
      this.ready = new Promise((resolve) => {
        frame.onload = () => resolve(frame.contentWindow);
      });
      document.documentElement.append(frame);
    }

    async postMessage(data) {
      (await this.ready).dispatchEvent(new MessageEvent("message", { data }));
    }
  };
}
