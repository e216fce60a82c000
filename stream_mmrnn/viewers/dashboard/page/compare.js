// Two sessions side by side: each is the page of its own view.
const asked = new URLSearchParams(location.search);
for (const id of ["a", "b"]) {
  const key = asked.get(id) || "";
  if (/^[A-Za-z0-9._-]{1,200}$/.test(key)) document.getElementById(id).src = `/view/${key}/`;
  else document.getElementById("compared").textContent = "choose two sessions in the menu of a session's page";
}
