"""Shows the embedded task's model: `python -m halos_trl.toy`."""

from transformers import AutoModelForCausalLM, AutoTokenizer

from .feedback import accuracy, sample
from .model import load_model_path
from .task import make_prompts, verify


def main() -> None:
    """Train the model if needed, show some of its samples and its accuracy."""
    path = load_model_path()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    prompts = make_prompts(8, 0, "test")
    for prompt, completion in zip(prompts, sample(model, tokenizer, prompts, 0, 1.0), strict=True):
        print(f"{prompt:11} -> {completion:8} {'right' if verify(prompt, completion) else 'wrong'}")
    sampled, greedy = accuracy(model, tokenizer), accuracy(model, tokenizer, temperature=0)
    print(f"held-out accuracy: {sampled:.3f} sampled, {greedy:.3f} greedy")


if __name__ == "__main__":
    main()
