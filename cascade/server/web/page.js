// The page: sound to the server, words to the screen. It speaks OpenAI's realtime events and asks for every change.
const $ = (id) => document.getElementById(id);
const seconds = (value) => `${value.toFixed(2)} s`;

const items = new Map();  // item id -> its words, in order of appearance; final ones too
const delays = [];
let changed = 0;          // words that were shown and then changed
let base = 0;             // seconds of the recordings before this one
let source = null;        // what is heard at the moment

// ---- Connection -------------------------------------------------------------------------------------------------

class Connection {
  constructor(rate, live) {
    Object.assign(this, { rate, live, sent: 0, base, isOver: false });
    const url = new URL("v1/realtime", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    const key = $("key").value.trim();
    this.socket = new WebSocket(url, key ? ["realtime", `openai-insecure-api-key.${key}`] : ["realtime"]);
    this.opened = new Promise((resolve, reject) => {
      this.socket.onopen = resolve;
      this.socket.onclose = (event) => {
        reject(new Error(event.reason || "The server does not let this page in: it is full or gone, or wants a key."));
        this.finish();
        if (!this.isOver) stopWith(event.reason || "The connection to the server is lost.");
      };
    });
    this.finished = new Promise((resolve) => { this.finish = resolve; });
    this.socket.onmessage = (message) => this.take(JSON.parse(message.data));
  }

  async open() {
    await this.opened;
    const input = { format: { type: "audio/pcm", rate: this.rate } };
    this.update(input, { include: ["cascade.partial"] });
    if (hotwords().length) this.prefer();
  }

  // Apart from what the page cannot do without: a server refuses an update as a whole.
  prefer() {
    this.update({ transcription: { hotwords: hotwords() } });
  }

  update(input, more = {}) {
    this.say({ type: "session.update", session: { type: "transcription", audio: { input }, ...more } });
  }

  say(event) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(event));
  }

  hear(buffer) {
    if (this.socket.readyState !== WebSocket.OPEN) return;
    this.socket.send(buffer);
    this.sent += buffer.byteLength / 2 / this.rate;
    $("heard").textContent = `${(this.base + this.sent).toFixed(1)} s`;
    if (this.live) showLevel(new Int16Array(buffer));
  }

  // All that was heard becomes final before the connection closes.
  async end() {
    base = this.base + this.sent;
    if (this.sent) {
      this.say({ type: "input_audio_buffer.commit" });
      await this.finished;  // or the connection's end, which the server brings if we are silent for long
    }
    this.isOver = true;
    this.socket.close(1000);
  }

  take(event) {
    const kind = event.type.replace("conversation.item.input_audio_transcription.", "");
    if (kind === "session.created") $("model").textContent = `model: ${event.session.audio.input.transcription.model}`;
    else if (kind === "session.updated") showPreferred(event.session.audio.input.transcription.hotwords.length);
    else if (kind === "cascade.partial") this.show(event, event.num_stable_words, false);
    else if (kind === "completed") this.show(event, Infinity, true);
    else if (kind === "cascade.finished") this.finish();
    else if (kind === "error" || kind === "failed") complain(event.error.message);
  }

  show(event, numStable, isFinal) {
    const before = items.get(event.item_id)?.words ?? [];
    const words = event.words.map((word, index) => ({
      ...word, start: this.base + word.start, end: this.base + word.end, isStable: index < numStable,
    }));
    if (this.live) {
      for (const word of words.slice(before.length)) delays.push(this.base + this.sent - word.end);
      delays.splice(0, delays.length - 50);
    }
    changed += countChanged(before.map((word) => word.word), words.map((word) => word.word));
    items.set(event.item_id, { words, isFinal });
    if (!words.length) items.delete(event.item_id);
    draw(event.item_id);
  }
}

// How many of the words before are not among those now, in order; a last word that has grown is no change.
function countChanged(before, now) {
  const last = before.length - 1;
  if (last >= 0 && now[last]?.startsWith(before[last])) now = [...now.slice(0, last), before[last], ...now.slice(last + 1)];
  let row = new Array(now.length + 1).fill(0);  // lengths of longest common subsequences
  for (const word of before) {
    const next = [0];
    now.forEach((other, i) => next.push(word === other ? row[i] + 1 : Math.max(row[i + 1], next[i])));
    row = next;
  }
  return before.length - row[now.length];
}

// ---- Screen -----------------------------------------------------------------------------------------------------

function draw(id) {
  const { scrollTop, clientHeight, scrollHeight } = $("transcript");
  const follows = scrollTop + clientHeight > scrollHeight - 40;  // whoever has scrolled up reads on undisturbed
  const item = items.get(id);
  const spans = (item?.words ?? []).flatMap((word) => {
    const span = document.createElement("span");
    span.textContent = word.word;
    span.className = item.isFinal ? "full" : word.isStable ? "stable" : "streaming";
    span.tabIndex = -1;
    span.title = `${seconds(word.start)} to ${seconds(word.end)}, confidence ${Math.round(100 * word.confidence)} %`;
    return word.spaced === false ? [span] : [" ", span];
  });
  if (item?.isFinal) {
    const line = document.createElement("p");
    line.append(...spans);
    $("final").append(line);
    $("open").replaceChildren();
  } else {
    $("open").replaceChildren(...spans);
  }
  $("hint").hidden = items.size > 0;
  if (!items.size) $("word").textContent = "";
  else $("word").textContent ||= "Choose a word for its time and confidence.";
  if (follows) $("transcript").scrollTop = $("transcript").scrollHeight;
  const total = [...items.values()].reduce((sum, { words }) => sum + words.length, 0);
  const sorted = [...delays].sort((a, b) => a - b);
  $("delay").textContent = sorted.length ? seconds(sorted[Math.floor(sorted.length / 2)]) : "–";
  $("flicker").textContent = total ? `${((100 * changed) / total).toFixed(1)} %` : "–";
  $("clear").disabled = $("download").disabled = ![...items.values()].some(({ isFinal }) => isFinal);
}

// Of a packet, from -60 to 0 dB.
function showLevel(samples) {
  const mean = samples.reduce((sum, sample) => sum + sample * sample, 0) / samples.length;
  const share = 1 + Math.log10(mean / 32768 ** 2 + 1e-9) / 6;
  $("level").firstChild.style.width = `${Math.round(100 * Math.max(0, Math.min(1, share)))}%`;
}

function hotwords() {
  return $("hotwords").value.split("\n").map((line) => line.trim()).filter(Boolean);
}

function showPreferred(count) {
  complain("");
  $("preferred").textContent = count ? `: ${count} preferred` : "";
}

function tell(text) {
  $("status").textContent = text;
}

function complain(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

function describe(event) {
  if (event.target.title) $("word").textContent = `“${event.target.textContent}” ${event.target.title}`;
}

$("transcript").addEventListener("mouseover", describe);
$("transcript").addEventListener("focusin", describe);
$("transcript").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const words = [...$("final").querySelectorAll("span")];
  if (!step || !words.length) return;
  const place = words.indexOf(document.activeElement);
  words[Math.max(0, Math.min(words.length - 1, place < 0 ? (step > 0 ? 0 : words.length - 1) : place + step))].focus();
  event.preventDefault();
});

// ---- Sound ------------------------------------------------------------------------------------------------------

async function openMicrophone() {
  if (!navigator.mediaDevices) throw new Error("Browsers give the microphone only to pages over https or on this machine.");
  const processing = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
  const stream = await navigator.mediaDevices.getUserMedia({ audio: processing });
  const context = new AudioContext();  // at the rate of the device
  await context.audioWorklet.addModule("microphone.js");
  const connection = new Connection(context.sampleRate, true);
  const node = new AudioWorkletNode(context, "microphone", { numberOfOutputs: 0 });
  const flushed = new Promise((resolve) => {
    node.port.onmessage = ({ data }) => (data ? connection.hear(data) : resolve());
  });
  const close = async () => {
    node.port.postMessage("end");
    await Promise.race([flushed, new Promise((resolve) => setTimeout(resolve, 500))]);
    stream.getTracks().forEach((track) => track.stop());
    await context.close();
  };
  try {
    await connection.open();
  } catch (error) {
    await close();
    throw error;
  }
  context.createMediaStreamSource(stream).connect(node);
  return { connection, close };
}

async function openFile(file) {
  const context = new AudioContext();
  let sound;
  try {
    sound = await context.decodeAudioData(await file.arrayBuffer());
  } catch {
    throw new Error(`This browser cannot read ${file.name} as sound.`);
  } finally {
    await context.close();
  }
  const channels = Array.from({ length: sound.numberOfChannels }, (_, index) => sound.getChannelData(index));
  const connection = new Connection(sound.sampleRate, false);
  await connection.open();
  let isOpen = true;
  const send = async () => {
    const size = Math.round(sound.sampleRate / 10);
    for (let start = 0; isOpen && start < sound.length; start += size) {
      const packet = new Int16Array(Math.min(size, sound.length - start));
      for (let i = 0; i < packet.length; i++) {
        const mean = channels.reduce((sum, channel) => sum + channel[start + i], 0) / channels.length;
        packet[i] = Math.max(-32768, Math.min(32767, Math.round(mean * 32768)));
      }
      connection.hear(packet.buffer);
      while (isOpen && connection.socket.bufferedAmount > 1 << 16) await new Promise((resolve) => setTimeout(resolve, 10));
    }
  };
  send().then(() => isOpen && stop());
  return { connection, close: async () => { isOpen = false; } };
}

async function start(open, text) {
  if (source) await stop();
  complain("");
  source = { isOpening: true };
  setButtons(true);
  tell("Opening …");
  try {
    source = await open();
    setButtons(true);
    tell(text);
  } catch (error) {
    source = null;
    setButtons(false);
    tell("");
    complain(error.message);
  }
}

async function stop() {
  if (!source || source.isOpening) return;
  const { connection, close } = source;
  source = null;
  tell("The last words …");
  await close();
  await connection.end();
  setButtons(false);
  tell("Done.");
}

function stopWith(reason) {
  complain(reason);
  source?.close?.();
  source = null;
  setButtons(false);
  tell("");
}

function setButtons(isOn) {
  $("record").textContent = isOn ? "Stop" : "Start microphone";
  $("record").classList.toggle("on", isOn);
  $("level").hidden = !isOn || !source?.connection?.live;
}

$("record").onclick = () => (source ? stop() : start(openMicrophone, "Listening."));
$("file").onchange = ({ target }) => {
  const [file] = target.files;
  if (file) start(() => openFile(file), `Reading ${file.name}.`);
  target.value = "";
};
let typing = 0;
$("hotwords").oninput = () => {
  clearTimeout(typing);
  typing = setTimeout(() => source?.connection?.prefer(), 500);
};
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", () => document.body.classList.remove("dropping"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  const [file] = event.dataTransfer.files;
  if (file) start(() => openFile(file), `Reading ${file.name}.`);
});

// ---- Subtitles --------------------------------------------------------------------------------------------------

// As the program `transcribe --srt` has it: at most 80 characters, 6 s and no pause of a second in one cue, which stays
// for a second if the next one lets it.
function cues() {
  const groups = [];
  for (const { words, isFinal } of items.values()) {
    if (!isFinal) continue;
    let group = null;
    for (const word of words) {
      const text = group && `${group.text}${word.spaced === false ? "" : " "}${word.word}`;
      const fits = group && text.length <= 80 && word.end - group.start <= 6 && word.start - group.end <= 1;
      if (fits) Object.assign(group, { text, end: word.end });
      else groups.push((group = { start: word.start, end: word.end, text: word.word }));
    }
  }
  groups.forEach((group, i) => {
    const next = groups[i + 1]?.start ?? Infinity;
    group.end = Math.max(Math.min(Math.max(group.end, group.start + 1), next), group.end);
  });
  return groups;
}

function clock(value) {
  return new Date(Math.round(1000 * value)).toISOString().slice(11, 23).replace(".", ",");
}

function srt() {
  return cues().map(({ start, end, text }, i) => `${i + 1}\n${clock(start)} --> ${clock(end)}\n${text}\n`).join("\n");
}

$("download").onclick = () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([srt()], { type: "application/x-subrip" }));
  link.download = "speech.srt";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
};
$("clear").onclick = () => {
  items.clear();
  delays.length = changed = 0;
  $("final").replaceChildren();
  draw(null);
};
