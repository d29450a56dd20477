// What a test asks of a page that is open: (what) => list of faults, in words.
(() => {
  /** [red, green, blue, alpha], all 0 to 1, of a colour as getComputedStyle gives it. */
  function parsed(colour) {
    const parts = (colour.match(/[-+.\d]+(e[-+]?\d+)?%?/g) ?? []).map((p) => (p.endsWith("%") ? parseFloat(p) / 100 : Number(p)));
    const unit = colour.startsWith("rgb") ? 255 : 1;
    if (!/^(rgba?|color\(srgb)/.test(colour) || parts.length < 3) throw new Error(`a colour of another kind: ${colour}`);
    return [parts[0] / unit, parts[1] / unit, parts[2] / unit, parts[3] ?? 1];
  }

  function over(top, below) {
    return [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  }

  function luminance(colour) {
    const [r, g, b] = colour.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }

  function behind(element) {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const layer = parsed(getComputedStyle(at).backgroundColor);
      layers.push(layer);
      if (layer[3] === 1) break;
    }
    return layers.reverse().reduce((below, layer) => over(layer, below), dark() ? [0, 0, 0, 1] : [1, 1, 1, 1]);
  }

  const dark = () => matchMedia("(prefers-color-scheme: dark)").matches;

  /** Of WCAG 2: 4.5 is enough for text, 3 for large text. */
  function contrast(element, style) {
    const below = behind(element);
    let alpha = 1;
    for (let at = element; at; at = at.parentElement) alpha *= Number(getComputedStyle(at).opacity);
    const ink = parsed(element.closest("svg") ? style.fill : style.color);
    const [light, deep] = [luminance(over([...ink.slice(0, 3), ink[3] * alpha], below)), luminance(below)].sort((a, b) => b - a);
    return (light + 0.05) / (deep + 0.05);
  }

  function named(element) {
    return `<${element.localName}${element.id ? ` id=${element.id}` : ""} class="${element.getAttribute("class") ?? ""}">`;
  }

  function seen(element) {
    return element.checkVisibility({ visibilityProperty: true, opacityProperty: true }) && element.getClientRects().length > 0;
  }

  /** Text that is too pale; what cannot be used at the moment may be. */
  function pale() {
    const faults = new Set();
    function look(element, style, text) {
      const size = parseFloat(style.fontSize);
      const enough = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700) ? 3 : 4.5;
      const ratio = contrast(element, style);
      if (ratio < enough) faults.add(`${ratio.toFixed(2)} of ${enough}: ${named(element)} "${text.trim().slice(0, 30)}"`);
    }
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const element = walker.currentNode.parentElement;
      if (!walker.currentNode.data.trim() || !seen(element) || element.closest(":disabled, .off, script, style, noscript")) continue;
      look(element, getComputedStyle(element), walker.currentNode.data);
    }
    for (const field of document.querySelectorAll("input, textarea")) {
      if (!seen(field) || field.disabled) continue;
      if (field.value) look(field, getComputedStyle(field), field.value);
      else if (field.placeholder) look(field, getComputedStyle(field, "::placeholder"), field.placeholder);
    }
    return [...faults];
  }

  /** What is wider than the window, the innermost first. */
  function wide() {
    const root = document.documentElement;
    if (root.scrollWidth <= root.clientWidth) return [];
    const out = [...document.querySelectorAll("body *")].filter((e) => seen(e) && e.getBoundingClientRect().right > root.clientWidth + 1);
    return [`the page is ${root.scrollWidth} wide in a window of ${root.clientWidth}`, ...out.reverse().slice(0, 8).map(named)];
  }

  function structure() {
    const faults = [];
    const all = (selector) => [...document.querySelectorAll(selector)].filter(seen);
    if (!document.documentElement.lang) faults.push("no language");
    if (!document.title.trim()) faults.push("no title");
    if (all("h1").length !== 1) faults.push(`${all("h1").length} first headings`);
    for (const landmark of ["main", "header", "nav"]) if (all(landmark).length < 1) faults.push(`no ${landmark}`);
    const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
    faults.push(...ids.filter((id, at) => ids.indexOf(id) !== at).map((id) => `the id ${id} twice`));
    for (const element of document.querySelectorAll("img:not([alt])")) faults.push(`no alt: ${named(element)}`);
    for (const element of all("[tabindex]")) if (element.tabIndex > 0) faults.push(`a tab order of its own: ${named(element)}`);
    for (const element of all("[onclick], [onerror], [style]")) {
      if (element.hasAttribute("onclick") || element.hasAttribute("onerror")) faults.push(`a script in an attribute: ${named(element)}`);
    }
    for (const label of document.querySelectorAll("label[for]")) {
      if (!document.getElementById(label.htmlFor)) faults.push(`a label of nothing: ${label.htmlFor}`);
    }
    for (const element of document.querySelectorAll("[aria-labelledby], [aria-describedby], [aria-controls]")) {
      for (const name of ["aria-labelledby", "aria-describedby", "aria-controls"]) {
        const ids = (element.getAttribute(name) ?? "").split(/\s+/).filter(Boolean);
        faults.push(...ids.filter((id) => !document.getElementById(id)).map((id) => `${name} of nothing: ${id}`));
      }
    }
    return faults;
  }

  return { pale, wide, structure };
})()
