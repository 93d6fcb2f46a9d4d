// Examples that show something true of the demo model; its failures are among them.

const BREAD = "How do I keep bread fresh for a few days?";
const GOOD =
  "Keep it in a paper bag or a bread box at room temperature. Slice only what you need. For longer than three days, freeze it in slices and toast them as you go.";

/** @type {Array<{name: string, lesson: string, state: () => {prompt: any, candidates: string[]}}>} */
export const EXAMPLES = [
  {
    name: "A ranking",
    lesson:
      "The demo model was trained on good answers and on the same answers made worse: cut short, hedged, rude, shouted. Edit a candidate and its bar moves.",
    state: () => ({
      prompt: BREAD,
      candidates: [
        "I am not sure, but maybe keep it in a paper bag or a bread box. Slice only what you need.",
        GOOD,
        "What a stupid question. Keep it in a paper bag or a bread box at room temperature.",
        "Keep it in a paper bag or a bread box at room temperature. Slice only what you",
        "KEEP IT IN A PAPER BAG OR A BREAD BOX! SLICE ONLY WHAT YOU NEED!",
        "I am sorry, but I cannot help with that request.",
      ],
    }),
  },
  {
    name: "A clear win",
    lesson: "The margin lies at the far end of the calibration pairs' margins, where nearly every pair is ranked right.",
    state: () => ({ prompt: BREAD, candidates: [GOOD, "What a stupid question. Put it somewhere."] }),
  },
  {
    name: "A tie",
    lesson: "The same advice in another order: the demo model gives nearly equal rewards, and the confidence says that the order is a coin toss.",
    state: () => ({
      prompt: BREAD,
      candidates: [
        GOOD,
        "Slice only what you need. Keep it in a paper bag or a bread box at room temperature. For longer than three days, freeze it in slices and toast them as you go.",
      ],
    }),
  },
  {
    name: "A length trap",
    lesson:
      "The demo model sees through filler and asides (B and C lose to the short A), since it met them in training. It does not see through D, one answer three times over: a failure, and a confident one.",
    state: () => ({
      prompt: BREAD,
      candidates: [
        "Keep it in a paper bag at room temperature, and freeze the rest in slices.",
        "It goes without saying that, all things considered, bread is a subject on which many people have many opinions, and at the end of the day there is, so to speak, a great deal to be said about it, basically, to be perfectly honest, for what it is worth, when all is said and done.",
        `${GOOD} As I said before: Slice only what you need. As I said before: Slice only what you need. That reminds me of something else entirely: At sunset the light of the sun takes a long way through the air.`,
        `${GOOD} ${GOOD} ${GOOD}`,
      ],
    }),
  },
  {
    name: "Too long",
    lesson: "A response over the model's limit is refused by name and its neighbours are ranked: no part of a response is ever cut off.",
    state: () => ({ prompt: BREAD, candidates: [GOOD, "Bread is bread. ".repeat(700), "Bread is bread."] }),
  },
  {
    name: "Off its data",
    lesson:
      "The demo model has never seen code: it prefers the wrong function, and its confidence fails to say that it does not know. A temperature is fitted on texts like those of the training, and holds for those.",
    state: () => ({
      prompt: "Write a Python function that returns the n-th Fibonacci number.",
      candidates: [
        "def fib(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a",
        "def fib(n):\n    return n * n",
      ],
    }),
  },
];
