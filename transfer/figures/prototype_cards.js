const percent = share => share >= 0.995 ? "100%" : share < 0.0001 ? "<0.01%" : (100 * share).toPrecision(2) + "%";
const size = prototype => prototype.images ? prototype.area * data.images / prototype.images : 0;

const cardType = {
  noun: "prototype",
  items: data.prototypes,
  note: "A card shows the images whose slots are most similar to the prototype, with its region in color and the cosine similarity below. The color next to the number is that of the prototype in the other figures.",
  terms: {
    usage: "Share of the images that use the prototype. An image uses a prototype that has the highest score at some position of its feature map.",
    size: "How much of the area of the images that use the prototype belongs to it.",
    area: "How much of the area of all images belongs to the prototype.",
  },
  searchHint: "17, 10-20 or file",
  firstOrder: "number",
  checkbox: "show unused",
  isUsed: prototype => prototype.images > 0,
  none: "No prototype is used.",
  // Sort keys; unused prototypes come last.
  orders: [
    {name: "usage", key: prototype => prototype.images, explanation: "share of the images that use the prototype"},
    {name: "size", key: size, explanation: "share of the area of the images that use the prototype"},
    {name: "area", key: prototype => prototype.area, explanation: "share of the area of all images"},
    {
      name: "score", label: "similarity", explanation: "cosine similarity of the nearest image",
      key: prototype => prototype.nearest.length ? prototype.nearest[0][1] : -2,
    },
  ],

  create(prototype, number) {
    const swatch = create("span", undefined, "swatch");
    swatch.style.background = prototype.color;
    const [article, head] = createCard(number, "Prototype " + number, swatch, number);
    if (prototype.images) {
      const [using, all] = [prototype.images, data.images].map(number => number.toLocaleString("en"));
      addTerm(head, "usage", `${percent(prototype.images / data.images)} (${using} of ${all} images)`);
      addTerm(head, "size", `${percent(size(prototype))} of ${prototype.images === 1 ? "its" : "their"} area`);
      addTerm(head, "area", `${percent(prototype.area)} of the total area`);
      const bar = create("div", undefined, "bar"), fill = create("i");
      fill.style.width = 100 * prototype.images / data.images + "%";
      bar.append(fill);
      head.append(bar);
      article.append(createRow(prototype.strip, createNeighborTiles(prototype)));
    } else {
      article.classList.add("unused");
      head.append(create("span", "not used by any image", "usage empty"));
    }
    if (prototype.similar.length) article.append(createSimilar(prototype));
    return article;
  },
};

function addTerm(head, term, text) {
  const element = create("span", undefined, "usage");
  element.append(create("b", term), " " + text);
  head.append(element);
}

function createSimilar(prototype) {
  const similar = create("p", "similar prototypes: ", "similar");
  prototype.similar.forEach(([other, cosine], position) => {
    const link = create("a", other);
    link.href = "#" + other;
    link.tabIndex = -1;
    similar.append(position ? ", " : "", link, ` (${cosine.toFixed(2)})`);
  });
  return similar;
}
