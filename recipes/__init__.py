"""The shipped recipes: YAML files read through `importlib.resources.files("llmmpq.recipes")`."""
