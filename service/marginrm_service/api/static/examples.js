// Examples for the demo model; each shows something that is true of it.

/** @type {Array<{name: string, lesson: string, state: () => {prompt: any, candidates: string[]}}>} */
export const EXAMPLES = [
  {
    name: "A clear win",
    lesson: "",
    state: () => ({ prompt: "How do I keep bread fresh for a few days?", candidates: ["Keep it in a paper bag.", "Bread is bread."] }),
  },
];
