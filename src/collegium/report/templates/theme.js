// Light and dark: as the system asks for, until the button is pressed.

const theme = {
  dark: false,
  changed: [],
  set(dark) {
    theme.dark = dark;
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    const button = document.getElementById("theme");
    button.setAttribute("aria-pressed", String(dark));
    return Promise.all(theme.changed.map((listener) => listener()));
  },
  get name() {
    return theme.dark ? "dark" : "light";
  },
};

{
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = false;
  theme.set(system.matches);
  system.addEventListener("change", () => chosen || theme.set(system.matches));
  document.getElementById("theme").addEventListener("click", () => {
    chosen = true;
    theme.set(!theme.dark);
  });
}
