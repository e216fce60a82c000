/* Search without a server. Browsers refuse to start a worker from file://, so an iframe runs the worker's script there.
   The plugin `offline` of mkdocs-material would load such a script from another host; it does not where mkdocs.yml names
   one whose file name holds "iframe-worker". The search script looks for `IFrameWorker` in its parent. */
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      this.iframe = document.createElement("iframe");
      this.iframe.hidden = true;
      document.body.append(this.iframe);
      const scope = this.iframe.contentWindow;
      scope.document.open();
      scope.document.write("<!doctype html><body></body>");
      scope.document.close();
      const load = (src) => new Promise((resolve, reject) => {
        const script = scope.document.createElement("script");
        Object.assign(script, {src, async: false, onload: resolve, onerror: reject});
        scope.document.body.append(script);
      });
      scope.importScripts = (...urls) => Promise.all(urls.map(load));
      scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", {data}));
      this.loaded = load(new URL(url, document.baseURI).href);
    }

    postMessage(data) {
      this.loaded.then(() => this.iframe.contentWindow.dispatchEvent(new MessageEvent("message", {data})));
    }

    terminate() {
      this.iframe.remove();
    }
  };
  window.Worker = window.IFrameWorker;
}
