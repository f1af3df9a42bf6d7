const viewTerms = {
  image: "A box marks the query patch.",
  PCA: "The first three principal components of the features of all patches on this page as red, green and blue: patches of one color have similar features.",
  attention: "Attention of the class token to the patches in the last block, the mean of the heads, from its smallest weight (black) to its largest (yellow).",
  "nearest patches": "The other images with the patches most similar to the query patch, which boxes mark, and the cosine similarity.",
};

const cardType = {
  noun: "image",
  items: data.cards,
  note: "A card shows what the features of the patches of an image represent.",
  terms: Object.fromEntries(Object.entries(viewTerms).filter(([term]) => term !== "attention" || data.views.includes(term))),
  searchHint: "file name",
  isUsed: () => true,
  none: "No images.",
  firstOrder: "dataset order",
  orders: [{
    name: "score", label: "similarity", explanation: "cosine similarity of the nearest patch",
    key: card => card.nearest.length ? card.nearest[0][1] : -2,
  }],

  create(card, number) {
    const name = data.names[card.image];
    const [article] = createCard(number, name, createName(name, "title"));
    const views = data.views.map(view => ({caption: view, label: `${name}, ${view}`}));
    article.append(createRow(card.strips[0], views, views.length));
    if (card.nearest.length) {
      article.append(create("p", "nearest patches", "similar"), createRow(card.strips[1], createNeighborTiles(card)));
    }
    return article;
  },

  // A query finds the image with this name, and those with a nearest patch in it.
  matches: (card, query) => [card.image, ...card.nearest.map(([image]) => image)]
    .some(image => data.names[image].toLowerCase().includes(query)),
};
