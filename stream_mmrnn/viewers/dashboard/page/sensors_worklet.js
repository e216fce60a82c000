// Sound as blocks of mono int16, with the number of samples that the context had made at the end of each.
class Blocks extends AudioWorkletProcessor {
  constructor({processorOptions: {frames}}) {
    super();
    this.frames = frames; this.block = new Int16Array(frames); this.filled = 0;
  }
  process([channels]) {
    if (!channels.length) { this.filled = 0; return true; }  // the microphone gives nothing: that is no silence
    for (let i = 0; i < channels[0].length; i++) {
      let sum = 0;
      for (const channel of channels) sum += channel[i];
      this.block[this.filled++] = Math.max(-32768, Math.min(32767, Math.round(32768 * sum / channels.length)));
      if (this.filled < this.frames) continue;
      this.port.postMessage({end: currentFrame + i + 1, block: this.block}, [this.block.buffer]);
      this.block = new Int16Array(this.frames); this.filled = 0;
    }
    return true;
  }
}
registerProcessor("blocks", Blocks);
