// Elements, texts and requests. Untrusted input is inserted as text, never as markup.
export const $ = id => document.getElementById(id);
export const set = (el, text) => { if (el.textContent !== text) el.textContent = text; };
export const make = (tag, cls) => { const el = document.createElement(tag); if (cls) el.className = cls; return el; };
export function fill(parent, items, create, update) {
  while (parent.children.length > items.length) parent.lastChild.remove();
  items.forEach((item, i) => { if (!parent.children[i]) parent.append(create(item)); update(parent.children[i], item, i); });
}
export const ms = v => v == null ? "–" : Math.abs(v) >= 100 ? v.toFixed(0) : Math.abs(v) >= 10 ? v.toFixed(1) : v.toFixed(2);
export function age(v) {
  if (v == null) return "–";
  if (v < 1000) return Math.max(0, Math.round(v)) + " ms";
  if (v < 100000) return (v / 1000).toFixed(v < 10000 ? 1 : 0) + " s";
  return v < 7200000 ? Math.round(v / 60000) + " min" : Math.round(v / 3600000) + " h";
}
export const clock = s => `${Math.floor(s / 60)}:${String(Math.floor(s % 60)).padStart(2, "0")}`;
export const number = v => v.toLocaleString("en");
export function announce(text) { set($("announcements"), text); }
export async function post(path, body) {
  try {
    const answer = await fetch(path, {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)});
    return answer.ok ? "" : (await answer.text()).trim();
  } catch { return "the session cannot be reached"; }
}
