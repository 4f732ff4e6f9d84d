// Everything together, once the page is there.

{
  const meta = JSON.parse(document.getElementById("page-meta").textContent);
  const start = async () => {
    new Viewer(meta.viewer, await readBlock("viewer-data"));
    await drawFigures(meta);
    document.documentElement.dataset.ready = "true";
  };
  start().catch((error) => {
    const words = `The figures and the token viewer cannot be shown by this browser: ${error.message}`;
    document.querySelector("main").prepend(make("p", { class: "card note", role: "alert" }, words));
    throw error;
  });
}
