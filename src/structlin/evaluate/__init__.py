"""What a trained language model knows: loss on a text, minimal pairs, few-shot prompts, and fine-tuning on a task."""
