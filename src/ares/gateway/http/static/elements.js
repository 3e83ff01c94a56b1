// Elements of a page: made, and changed only where they differ. Data from outside becomes text, never markup.

export const set = (element, text) => {
  if (element.textContent !== text) element.textContent = text;
};

export const make = (tag, className, ...children) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
};
