(() => {
  const tip = document.getElementById("tip");
  const hide = () => { tip.hidden = true; };
  const show = (event) => {
    const mark = event.target instanceof Element ? event.target.closest("svg [aria-label]") : null;
    if (!mark || mark.closest(".role-axis, .role-legend")) { hide(); return; }
    tip.textContent = mark.getAttribute("aria-label");
    tip.hidden = false;
    const left = Math.min(event.clientX + 12, window.innerWidth - tip.offsetWidth - 8);
    const below = event.clientY + 16;
    const fits = below + tip.offsetHeight < window.innerHeight;
    tip.style.left = `${Math.max(left, 8)}px`;
    tip.style.top = `${fits ? below : event.clientY - tip.offsetHeight - 12}px`;
  };
  for (const kind of ["pointermove", "pointerdown"]) document.addEventListener(kind, show, { passive: true });
  for (const kind of ["scroll", "pointerleave", "blur"]) window.addEventListener(kind, hide, { passive: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
})();
