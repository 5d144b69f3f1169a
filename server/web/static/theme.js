// Light or dark, before anything is drawn: what was chosen here, else what the system prefers.
try {
  const chosen = JSON.parse(localStorage.getItem("octavo.theme"));
  if (chosen) document.documentElement.dataset.theme = chosen;
} catch {
  // storage is forbidden: what the system prefers
}
