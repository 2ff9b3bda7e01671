// Gathers the microphone's samples, at the browser's own rate, into 16-bit packets.
const PACKET = 2048;

class Microphone extends AudioWorkletProcessor {
  constructor() {
    super();
    this.packet = new Int16Array(PACKET);
    this.count = 0;
    this.port.onmessage = () => {  // the end: what there is, then a sign that nothing follows
      this.send();
      this.port.postMessage(null);
    };
  }

  send() {
    const samples = this.packet.slice(0, this.count);
    this.count = 0;
    if (samples.length) this.port.postMessage(samples.buffer, [samples.buffer]);
  }

  process([channels]) {
    if (!channels.length) return true;
    for (let i = 0; i < channels[0].length; i++) {
      let sum = 0;
      for (const channel of channels) sum += channel[i];
      this.packet[this.count++] = Math.max(-32768, Math.min(32767, Math.round((sum / channels.length) * 32768)));
      if (this.count === PACKET) this.send();
    }
    return true;
  }
}

registerProcessor("microphone", Microphone);
