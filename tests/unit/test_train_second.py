"""The deep model before it is trained: its shape, and what it has of the demo."""

import pytest
import torch
import train_second
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def demo():
    return AutoModelForCausalLM.from_pretrained(train_second.DEMO, dtype=torch.float32).eval()


def test_a_deep_model_has_seven_linears_in_each_block_and_quiet_writers(demo):
    torch.manual_seed(0)
    model = train_second.build_deep(demo, 8)
    linears = {name: weight for name, weight in model.named_parameters() if name.endswith("_proj.weight")}
    assert len(linears) == 56
    for name, weight in linears.items():
        wanted = weight.shape[1] ** -0.5 / (4.0 if "o_proj" in name or "down_proj" in name else 1.0)
        assert weight.detach().std().item() == pytest.approx(wanted, rel=0.05)


def test_its_embedding_keeps_the_leading_directions_of_the_demos(demo):
    theirs = demo.get_input_embeddings().weight
    ours = train_second.build_deep(demo, 1).get_input_embeddings().weight
    *_, right = torch.linalg.svd(theirs, full_matrices=False)
    leading = right[: train_second.DEEP_HIDDEN]
    torch.testing.assert_close(ours @ ours.T, theirs @ leading.T @ leading @ theirs.T, rtol=1e-3, atol=1e-4)
