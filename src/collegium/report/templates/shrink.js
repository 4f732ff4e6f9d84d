// The page of a smaller model: its figures, once they are there.

{
  const meta = JSON.parse(document.getElementById("page-meta").textContent);
  const start = async () => {
    await drawFigures(meta);
    document.documentElement.dataset.ready = "true";
  };
  start().catch((error) => {
    const words = `The figures cannot be shown by this browser: ${error.message}`;
    document.querySelector("main").prepend(make("p", { class: "card note", role: "alert" }, words));
    throw error;
  });
}
