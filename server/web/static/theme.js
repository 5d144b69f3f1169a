// Light or dark, before anything is drawn: what was chosen here, else what the system prefers.
const chosenTheme = localStorage.getItem("octavo.theme");
if (chosenTheme) document.documentElement.dataset.theme = chosenTheme;
