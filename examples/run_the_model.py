"""Open a model, continue a text, ask a question, look at logits. Run it as it is: it uses the
embedded model.

python examples/run_the_model.py [MODEL_DIR] [BACKEND]
"""

import sys

import numpy as np

import dsv4_core as dsv4


def main():
    directory = sys.argv[1] if len(sys.argv) > 1 else None
    backend = sys.argv[2] if len(sys.argv) > 2 else "reference"
    with dsv4.load(directory, backend=backend) as model:
        print("Text, as it comes:")
        for event in model.generate("A kludge is", max_tokens=12):
            print(event.text, end="", flush=True)
        print("\n\nTwo conversations, as one batch:")
        questions = ["What is kludge?", "What is a Turing tar-pit?"]
        turns = [[{"role": "user", "content": question}] for question in questions]
        replies = model.generate(turns, max_tokens=12).run()
        for question, text in zip(questions, replies.texts, strict=True):
            print(f"{question} -> {text!r}")
        logits = model.logits([0, 3, 327])
        print(f"\nLogits {list(logits.shape)}; the likeliest id after each token: {np.argmax(logits, -1).tolist()}")


if __name__ == "__main__":
    main()
