import math

import pytest
import torch

import lamina as lm
from lamina.errors import TaskError
from task_helpers.probe import accuracy, fit, probe_accuracy
from task_helpers.snippets import (
    BySimilarLength,
    Encoded,
    Snippet,
    collate,
    distinct,
    label_of,
    loaders,
    read_snippets,
    same_words,
    split,
)

SNIPPETS = [Snippet(f"text number {n}", n % 2) for n in range(60)]


# -------------------------------------------------------------------------------------- the texts


@pytest.mark.parametrize(
    ("rating", "label"),
    [(0.5, None), (-0.5, None), (0.0, None), (0.51, 1), (-0.51, 0), (4.0, 1), (math.nan, None)],
)
def test_label_is_the_sign_of_a_clear_rating(rating, label):
    assert label_of(rating) == label


def test_reading(tmp_path):
    path = tmp_path / "movie.txt"
    path.write_bytes("1\t2.5\tFun – a\ttab\r\n2\t0.2\tMeh\r\n3\t-1\tDull\r\n".encode())
    assert read_snippets(path) == [Snippet("Fun – a\ttab", 1), Snippet("Dull", 0)]


@pytest.mark.parametrize("line", ["1\t2.5", "1\tmany\tx", ""])
def test_a_line_that_cannot_be_read_is_named(tmp_path, line):
    path = tmp_path / "movie.txt"
    path.write_text(f"1\t2.5\tfine\n{line}\n", encoding="utf-8")
    with pytest.raises(TaskError, match=r"movie\.txt, line 2: expected 'id"):
        read_snippets(path)


def test_duplicates_are_found_whatever_their_punctuation():
    texts = ["A film!", "a  FILM", "'a film.'", "a films"]
    assert [s.text for s in distinct(Snippet(t, 1) for t in texts)] == ["A film!", "a films"]


def test_split_is_fixed_and_shares_no_text():
    doubled = [*SNIPPETS, *(Snippet(s.text.upper() + "!", s.label) for s in SNIPPETS)]
    train, held_out = split(doubled, 40, 20, seed=1)
    assert (len(train), len(held_out)) == (40, 20)
    words = [{same_words(snippet.text) for snippet in part} for part in (train, held_out)]
    assert len(words[0] | words[1]) == 60
    assert split(doubled, 40, 20, seed=1) == (train, held_out)
    assert split(doubled, 40, 20, seed=2) != (train, held_out)
    with pytest.raises(TaskError, match="only 60 distinct"):
        split(doubled, 41, 20, seed=1)


def test_batches_are_padded_to_their_longest_text():
    batch = collate([Encoded([5, 6, 7], 1), Encoded([8], 0)])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[True] * 3, [True, False, False]]
    assert batch["labels"].tolist() == [1, 0]


def test_order_is_a_function_of_seed_and_epoch():
    lengths = [1 + n % 40 for n in range(100)]
    sampler = BySimilarLength(lengths, 8, seed=3)
    first, second = list(sampler), list(sampler)
    assert first != second
    assert sorted(first) == sorted(second) == list(range(100))
    sampler.set_epoch(1)
    assert list(sampler) == second
    assert list(BySimilarLength(lengths, 8, seed=3)) == first
    assert list(BySimilarLength(lengths, 8, seed=4)) != first


def test_batches_hold_texts_of_similar_length():
    lengths = [1 + n % 40 for n in range(400)]
    order = BySimilarLength(lengths, 8, seed=0).order(0)
    spreads = [
        max(lengths[i] for i in order[s : s + 8]) / sum(lengths[i] for i in order[s : s + 8]) * 8
        for s in range(0, 400, 8)
    ]
    assert sum(spreads) / len(spreads) < 1.3  # without the order it is about 1.8


def test_loaders_give_every_text_once():
    items = [Encoded([7] * (1 + n % 5), n % 2) for n in range(22)]
    both = loaders(items, items[:10], batch_size=4, seed=0)
    assert sum(len(batch["labels"]) for batch in both["train"]) == 22
    assert sum(len(batch["labels"]) for batch in both["validation"]) == 10


# -------------------------------------------------------------------------------------- the probe


def test_probe_matches_its_optimality_condition():
    torch.manual_seed(0)
    x, y, strength = torch.randn(80, 5) * 3 + 1, torch.randint(2, (80,)), 0.1
    weight, bias = fit(x, y, strength)
    mean, scale = x.double().mean(0), x.double().std(0)
    inputs = (x.double() - mean) / scale
    inner = weight * scale[:, None]
    wrong = torch.softmax(inputs @ inner + bias + mean @ weight, 1)
    wrong -= torch.nn.functional.one_hot(y, 2)
    assert (inputs.T @ wrong / 80 + strength * inner).abs().max() < 1e-5
    assert wrong.mean(0).abs().max() < 1e-5


def test_probe_separates_what_is_separable():
    torch.manual_seed(0)
    labels = torch.arange(200) % 2
    features = torch.randn(200, 8) + 4.0 * labels[:, None]
    assert probe_accuracy(features[:150], labels[:150], features[150:], labels[150:]) == 1.0
    shifted = fit(features, labels, 1e-2)
    assert accuracy(features, 1 - labels, *shifted) < 0.05
    with pytest.raises(TaskError, match="at least 10"):
        probe_accuracy(features[:4], labels[:4], features, labels)


# -------------------------------------------------------------------------------------- the model


@pytest.fixture
def tiny():
    transformers = pytest.importorskip("transformers")
    from task_helpers.encoder import ReviewClassifier

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    return ReviewClassifier(config)


def test_parameters_have_berts_names(tiny):
    names = [name for name, _ in tiny.named_parameters()]
    assert {name.split(".")[0] for name in names} == {"embeddings", "encoder", "classifier"}
    assert "encoder.layer.1.attention.self.query.weight" in names
    assert "embeddings.word_embeddings.weight" in names
    assert names[-2:] == ["classifier.weight", "classifier.bias"]


def test_every_parameter_gets_a_gradient(tiny):
    import reviews

    batch = collate([Encoded([3, 4, 5, 6], 1), Encoded([7, 8], 0)])
    reviews.loss(tiny, batch).backward()
    assert [name for name, p in tiny.named_parameters() if p.grad is None] == []


def test_padding_changes_nothing(tiny):
    tiny.eval()
    short = collate([Encoded([7, 8], 0)])
    padded = collate([Encoded([7, 8], 0), Encoded([3, 4, 5, 6], 1)])
    alone = tiny(short["input_ids"], short["attention_mask"])
    together = tiny(padded["input_ids"], padded["attention_mask"])
    torch.testing.assert_close(alone[0], together[0])


def test_metrics_are_per_text_and_average_to_the_loss(tiny):
    import reviews

    tiny.eval()
    batch = collate([Encoded([3, 4, 5, 6], 1), Encoded([7, 8], 0), Encoded([9], 0)])
    metrics = reviews.metrics(tiny, batch)
    assert {name: value.shape for name, value in metrics.items()} == {
        "loss": (3,),
        "accuracy": (3,),
    }
    torch.testing.assert_close(metrics["loss"].mean(), reviews.loss(tiny, batch))
    assert set(metrics["accuracy"].tolist()) <= {0.0, 1.0}


def test_features_equal_those_of_transformers(tiny):
    """Oracle: the whole model of the library, loaded with the same weights."""
    transformers = pytest.importorskip("transformers")
    bert = transformers.BertModel(tiny.encoder.config, add_pooling_layer=False).eval()
    state = {k: v for k, v in tiny.state_dict().items() if not k.startswith("classifier.")}
    bert.load_state_dict(state)
    batch = collate([Encoded([3, 4, 5, 6], 1), Encoded([7, 8], 0)])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    hidden = bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    expected = torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)])
    torch.testing.assert_close(tiny.eval().features(ids, mask), expected)


def test_pretrained_weights_are_loaded_or_refused(tiny, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    from task_helpers.encoder import load_classifier

    weights = {k: v + 1 for k, v in tiny.state_dict().items() if not k.startswith("classifier.")}
    weights |= {"pooler.dense.weight": torch.zeros(1), "embeddings.position_ids": torch.zeros(1)}
    tiny.encoder.config.to_json_file(tmp_path / "config.json")
    safetensors.save_file(weights, tmp_path / "model.safetensors")
    loaded = load_classifier(tmp_path)
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(loaded.state_dict()[name], weights[name])

    safetensors.save_file({"else": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(TaskError, match=r"cannot be loaded.*fetch it anew"):
        load_classifier(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(TaskError, match=r"cannot be loaded.*fetch it anew"):
        load_classifier(tmp_path)


def test_the_plan_fits_the_model(tiny):
    import reviews

    plan = lm.Plan.from_toml(reviews.PLAN)
    optimizer = plan.build(tiny, epochs=reviews.DEFAULTS["epochs"], steps_per_epoch=10)
    assert len(optimizer.param_groups) >= 4
    assert not any(p.requires_grad for p in tiny.embeddings.parameters())
    assert all(p.requires_grad for p in tiny.classifier.parameters())
    assert set(reviews.DEFAULTS) == {"epochs", "batch_size", "seed"}


@pytest.mark.network
def test_the_real_task_learns_in_a_few_steps():
    pytest.importorskip("transformers")
    import reviews

    torch.manual_seed(0)
    model, parts = reviews.model(), reviews.data(batch_size=8)
    sizes = [len(parts[part].dataset) for part in ("train", "validation")]
    assert sizes == [reviews.TRAIN_TEXTS, reviews.HELD_OUT_TEXTS]
    assert sum(p.numel() for p in model.parameters()) == 22_566_146
    batch = next(iter(parts["train"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(6):
        value = reviews.loss(model, batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0]
