"""The long prompt of these examples: a text that all requests begin with, and one request's question."""

THEMES = ("a page of the cache", "a block", "a request", "a store", "the scheduler", "a worker", "an answer")
DUTIES = ("is named by every token before it", "is written once and read often", "waits for nobody", "fits its budget")


def make_prompt(num_rules: int) -> str:
    """Return a prompt of about 24 words a rule."""
    rules = [
        f"Rule {number}: {THEMES[number % len(THEMES)]} {DUTIES[number % len(DUTIES)]}, "
        f"unless rule {number * 7 % num_rules} says otherwise or there are more than {number} of them."
        for number in range(num_rules)
    ]
    return " ".join(rules) + " Question: which rule comes first, and why? Answer:"
