// Becomes the report that the page around this frame sends. It keeps this frame's policy, under which scripts run with an
// origin of their own, and connect to nothing.
addEventListener("message", (event) => {
  if (event.source !== parent || typeof event.data !== "string") return;
  document.open();
  document.write(event.data);
  document.close();
});
