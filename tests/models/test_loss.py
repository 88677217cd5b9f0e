import pytest
import torch
import torch.nn.functional as F
from rounding import assert_same_function
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flipproof
from flipproof import BitFlipSpec, LoraSpec
from flipproof.faults.inject import fault_state, iter_faulty
from flipproof.models import loss
from flipproof.models.loss import IGNORED, LossHead, Teacher, ask_teacher, fuse_loss, next_token_loss

TOKENS, WIDTH, VOCABULARY = 12, 8, 37


@pytest.fixture(autouse=True)
def five_rows_at_a_time(monkeypatch):
    """22 predicted tokens make four chunks and a ragged last one."""
    monkeypatch.setattr(loss, "HELD_LOGITS", 5 * VOCABULARY + 3)


def make_head(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias, dtype=dtype)
    nn.init.normal_(head.weight)
    if bias:
        nn.init.normal_(head.bias)
    return head


def make_hidden(dtype=torch.float32):
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def make_labels(ignored="some"):
    labels = torch.randint(0, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(2))
    if ignored == "some":
        labels[0, 3:6] = labels[1, -1] = IGNORED
    elif ignored == "a row":
        labels[1] = IGNORED
    elif ignored == "all":
        labels[:] = IGNORED
    return labels


def by_torch(head, hidden, labels, factor):
    """Loss and gradients of ``factor`` times it by F.cross_entropy on whole logits, all in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, head.weight)]
    bias = None if head.bias is None else head.bias.detach().double().requires_grad_()
    logits = F.linear(*leaves, bias)[:, :-1].reshape(-1, VOCABULARY)
    expected = F.cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=IGNORED)
    (expected * factor).backward()
    return expected.detach(), [leaf.grad for leaf in leaves], None if bias is None else bias.grad


def fused(head, hidden, labels):
    head = LossHead(head)
    head.targets = labels
    return head(hidden)


@pytest.mark.parametrize("ignored", ["none", "some", "a row"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("train_hidden", "train_head"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradients_are_torchs(dtype, train_hidden, train_head, bias, ignored):
    head, hidden, labels = make_head(bias, dtype), make_hidden(dtype), make_labels(ignored)
    head.requires_grad_(train_head)
    hidden.requires_grad_(train_hidden)
    got = fused(head, hidden, labels)
    assert got.dtype == torch.float32
    (got * 3.0).backward()

    gradients = {"hidden": hidden.grad, "weight": head.weight.grad, "bias": head.bias.grad if bias else None}
    trained = [train_hidden, train_head, train_head and bias]
    assert [grad is not None for grad in gradients.values()] == trained
    assert all(grad.dtype == dtype for grad in gradients.values() if grad is not None)

    def expected():  # the softmax is in float32 whatever the dtype
        loss, (grad_hidden, grad_weight), grad_bias = by_torch(head, hidden, labels, 3.0)
        wanted = {"hidden": grad_hidden, "weight": grad_weight, "bias": grad_bias}
        return [loss, *(wanted[name] for name, grad in gradients.items() if grad is not None)]

    found = [got, *(grad for grad in gradients.values() if grad is not None)]
    assert_same_function([one.double() for one in found], expected, [hidden, *head.parameters()])


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_sums_over_chunks_are_float32(autocast):
    """Against the same weights in float64: logits and their gradient are rounded to 8 bits, the loss is not more."""
    head, hidden, labels = make_head(), make_hidden(), make_labels()
    with torch.no_grad():  # both sides have the same numbers
        head.weight.copy_(head.weight.bfloat16())
        head.bias.copy_(head.bias.bfloat16())
        hidden.copy_(hidden.bfloat16())
    expected, (grad_hidden, grad_weight), grad_bias = by_torch(head, hidden, labels, 1.0)
    dtype = torch.float32 if autocast else torch.bfloat16
    head, hidden = head.to(dtype), hidden.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = fused(head, hidden, labels)
    assert got.dtype == torch.float32
    got.backward()
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=0)
    for grad, wanted in ((hidden.grad, grad_hidden), (head.weight.grad, grad_weight), (head.bias.grad, grad_bias)):
        assert grad.dtype == dtype
        assert float((grad.double() - wanted).norm() / wanted.norm()) < 2**-7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the product that adds to a float32 sum is a GPU's")
def test_products_add_to_the_sum_of_the_weight_s_gradient_in_float32():
    """Each chunk's product rounded to bfloat16 before it is added would be off by 2**-9."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(48, 40, generator=generator).bfloat16().cuda() for _ in range(2))
    total = torch.randn(48, 48, generator=generator).cuda()
    expected = total.double() + a.double() @ b.double().T
    loss._add_product_(total, a, b.T)
    assert float((total.double() - expected).norm() / expected.norm()) < 1e-6


def test_without_gradients_the_loss_is_the_same():
    head, hidden, labels = make_head(), make_hidden(), make_labels()
    with torch.no_grad():
        alone = fused(head, hidden, labels)
    assert torch.equal(alone, fused(head, hidden.requires_grad_(), labels).detach())


def test_where_all_labels_are_ignored_the_loss_is_0_and_so_are_the_gradients():
    head, hidden, labels = make_head(), make_hidden().requires_grad_(), make_labels("all")
    got = fused(head, hidden, labels)
    assert got.item() == 0
    got.backward()
    for grad in (hidden.grad, head.weight.grad, head.bias.grad):
        assert not grad.any()  # NaN would be true


def test_logits_beyond_the_range_of_exp():
    head, hidden, labels = make_head(), (make_hidden() * 1e4).requires_grad_(), make_labels("none")
    got = fused(head, hidden, labels)
    got.backward()

    def expected():
        loss, (grad_hidden, _), _ = by_torch(head, hidden, labels, 1.0)
        return loss, grad_hidden

    found = (got.double(), hidden.grad.double())
    assert_same_function(found, expected, [hidden, *head.parameters()])


def test_a_float16_gradient_survives_by_the_loss_scale():
    """Of 2^15 tokens a gradient divided by their number would be below float16's least, 6e-8; times 2^16 it is not."""
    hidden = torch.full((1, 2**15 + 1, 1), 0.0, dtype=torch.float16).requires_grad_()
    head = nn.Linear(1, 2, bias=False, dtype=torch.float16)
    nn.init.constant_(head.weight, 1.0)
    with torch.no_grad():
        head.weight[1] = 1 - 2**-10
    got = fused(head.requires_grad_(False), hidden, torch.zeros(1, 2**15 + 1, dtype=torch.int64))
    (got * 2.0**16).backward()
    # p - e is (-1/2, 1/2); times W it is -2^-11; times 2^16 / 2^15
    assert hidden.grad[0, :-1].unique().tolist() == [-(2.0**-10)]
    assert not hidden.grad[0, -1:].any()


# -- in a model --------------------------------------------------------------------------------------------------------


def whole_logits_loss(model, ids, labels):
    logits = model(ids).logits[:, :-1]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=IGNORED)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_a_model_with_the_head_has_the_gradients_of_one_without(tiny_llama, token_ids, tied, given):
    plain, model = (tiny_llama(tie_word_embeddings=tied).train() for _ in range(2))
    labels = token_ids.clone()
    if given:
        labels[0, :7] = IGNORED
    fuse_loss(model)
    assert type(model.lm_head) is LossHead
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    got = next_token_loss(model, token_ids, labels if given else None)
    assert model.state_dict().keys() == plain.state_dict().keys()

    def gradients(of, loss):
        of.zero_grad()
        loss.backward()
        return {"loss": loss} | {name: parameter.grad for name, parameter in of.named_parameters()}

    def expected():
        return gradients(plain, whole_logits_loss(plain, token_ids, labels))

    assert_same_function(gradients(model, got), expected, plain.parameters())


def test_faulty_layers_and_the_head_go_together(tiny_llama, token_ids):
    plain, model = tiny_llama(), tiny_llama()
    for each in (plain, model):
        flipproof.inject(each, BitFlipSpec(w_p_frac=0.01, x_p_frac=0.01), LoraSpec(r=2))
    fuse_loss(model)

    def expected():
        flipproof.set_tick(plain, 0)
        return next_token_loss(plain, token_ids)

    assert_same_function(next_token_loss(model, token_ids), expected, plain.parameters())


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator gives, and of any whose last dimension is the vocabulary."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.numel, self.logits = vocabulary, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
                if tensor.dim() and tensor.shape[-1] == self.vocabulary:
                    self.logits = max(self.logits, tensor.numel())
        return result


@pytest.mark.parametrize("frozen", [False, True])
def test_logits_are_never_held_whole(tiny_llama, monkeypatch, frozen):
    """48 rows at a time, and nothing else is larger; a transposed weight, (32, vocabulary), is smaller."""
    vocabulary, tokens = 1031, 4 * 64
    monkeypatch.setattr(loss, "HELD_LOGITS", 48 * vocabulary)
    ids = torch.randint(0, vocabulary, (4, 65), generator=torch.Generator().manual_seed(0))
    seen = []
    for fuse in (False, True):
        model = tiny_llama(vocab_size=vocabulary)
        model.lm_head.requires_grad_(not frozen)
        if fuse:
            fuse_loss(model)
        with _Largest(vocabulary) as largest:
            next_token_loss(model, ids).backward()
        seen.append(largest)
    assert seen[0].logits >= tokens * vocabulary  # the probe sees whole logits where there are some
    assert seen[1].logits == 48 * vocabulary
    assert seen[1].numel < tokens * vocabulary / 4


def test_the_head_gives_logits_as_always(tiny_llama, token_ids):
    plain, model = tiny_llama().eval(), tiny_llama().eval()
    fuse_loss(model)
    assert torch.equal(model(token_ids).logits, plain(token_ids).logits)
    next_token_loss(model, token_ids)
    assert torch.equal(model(token_ids).logits, plain(token_ids).logits)  # the loss leaves nothing behind
    assert model.lm_head.gave is None
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 257}
    assert torch.equal(model.generate(token_ids, **options), plain.generate(token_ids, **options))


def _tiny(kind, **more):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        pad_token_id=0,
        **more,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Gemma2", {"final_logit_softcapping": 0.05}),
        ("Cohere", {"logit_scale": 3.0}),
        ("Granite", {"logits_scaling": 0.3}),
    ],
)
def test_a_model_that_works_on_its_logits_keeps_its_head(token_ids, kind, more):
    model = _tiny(kind, **more)
    fuse_loss(model)
    assert type(model.get_output_embeddings()) is nn.Linear
    got = next_token_loss(model, token_ids)
    got.backward()
    assert model.get_input_embeddings().weight.grad.any()
    with torch.no_grad():
        assert_same_function(got, lambda: whole_logits_loss(model, token_ids, token_ids), model.parameters())
    # and what it does to them is seen in the loss
    raw = model.lm_head(model.model(token_ids).last_hidden_state)[:, :-1].reshape(-1, 258)
    assert abs(got.item() - F.cross_entropy(raw, token_ids[:, 1:].reshape(-1)).item()) > 1e-3


@pytest.mark.parametrize("change", [lambda t: t * 2, lambda t: t.bfloat16(), lambda t: torch.tanh(t / 30) * 30])
def test_an_unknown_change_of_the_logits_is_refused(tiny_llama, token_ids, change):
    model = tiny_llama()
    forward = type(model).forward

    class Changing(type(model)):
        def forward(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            output.logits = change(output.logits)
            return output

    model.__class__ = Changing
    fuse_loss(model)
    with pytest.raises(NotImplementedError, match="Changing changes its logits after the output head"):
        next_token_loss(model, token_ids)
    assert model(token_ids).logits.shape == (2, 24, 258)  # it goes on giving logits


def test_an_evaluation_takes_no_gradients(tiny_llama, token_ids):
    """A function's ``needs_input_grad`` is true of parameters under no_grad too."""
    model = tiny_llama()
    fuse_loss(model)
    expected = next_token_loss(model, token_ids)
    weight = model.lm_head.weight

    class Count(TorchDispatchMode):
        shapes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            self.shapes += function is torch.ops.aten.zeros.default and result.shape == weight.shape
            return result

    for on, formed in ((True, 1), (False, 0)):
        with torch.set_grad_enabled(on), Count() as count:
            assert torch.equal(next_token_loss(model, token_ids), expected)
        assert count.shapes == formed


# -- distilled ---------------------------------------------------------------------------------------------------------


def distilled_by_torch(logits, taught, labels, share):
    """By torch's own functions on whole logits (batch, sequence, vocabulary), in float64."""
    counts = labels[:, 1:].reshape(-1) != IGNORED
    own, taught = (each.double()[:, :-1].reshape(-1, each.shape[-1])[counts] for each in (logits, taught))
    of_text = F.cross_entropy(own, labels[:, 1:].reshape(-1)[counts])
    return (1 - share) * of_text + share * F.kl_div(own.log_softmax(1), taught.softmax(1), reduction="batchmean")


@pytest.mark.parametrize("ignored", ["none", "some"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_distilled_loss_and_its_gradients_are_torchs(dtype, share, bias, ignored):
    head, labels = LossHead(make_head(bias, dtype)), make_labels(ignored)
    hidden, taught = make_hidden(dtype).requires_grad_(), make_hidden(dtype).flip(1)
    parameters = [hidden, *head.parameters()]

    def graded(loss):
        return [loss.double(), *(grad.double() for grad in torch.autograd.grad(loss * 3.0, parameters))]

    def expected():
        with torch.no_grad():
            others = F.linear(taught.double(), *(each.double() for each in head.parameters()))
        own = F.linear(hidden.double(), *(each.double() for each in head.parameters()))
        return graded(distilled_by_torch(own, others, labels, share))

    head.targets, head.teacher = labels, Teacher(taught, share)
    assert_same_function(graded(head(hidden)), expected, parameters)


@pytest.mark.parametrize("autocast", [False, True])
def test_distilled_in_bfloat16_the_loss_is_float32(autocast):
    held, hidden = make_head().bfloat16(), make_hidden(torch.bfloat16)
    taught, labels = hidden.flip(1), make_labels()
    wide = hidden.double().requires_grad_()
    own, others = (F.linear(each, held.weight.double(), held.bias.double()) for each in (wide, taught.double()))
    expected = distilled_by_torch(own, others, labels, 0.7)
    expected.backward()
    dtype = torch.float32 if autocast else torch.bfloat16
    head, hidden = LossHead(held.to(dtype)), hidden.to(dtype).requires_grad_()
    head.targets, head.teacher = labels, Teacher(taught.to(dtype), 0.7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = head(hidden)
    assert got.dtype == torch.float32
    got.backward()
    torch.testing.assert_close(got.double(), expected.detach(), rtol=2**-8, atol=0)
    assert float((hidden.grad.double() - wide.grad).norm() / wide.grad.norm()) < 2**-7


def test_a_distilled_float16_gradient_survives_by_the_loss_scale():
    head = LossHead(nn.Linear(1, 2, bias=False, dtype=torch.float16).requires_grad_(False))
    head.weight.copy_(torch.tensor([[2.0**-11], [0.0]]))
    hidden = torch.zeros(1, 2**15 + 1, 1, dtype=torch.float16).requires_grad_()
    # the teacher's logits differ by 31, so that its distribution is (1, 0) and p - q is (-1/2, 1/2)
    head.targets, head.teacher = torch.ones(1, 2**15 + 1, dtype=torch.int64), Teacher(0 * hidden.detach() + 63488, 1.0)
    (head(hidden) * 2.0**16).backward()
    assert hidden.grad[0, :-1].unique().tolist() == [-(2.0**-11)]


def test_a_share_of_0_changes_no_bit_and_who_says_the_same_learns_nothing(monkeypatch):
    monkeypatch.setattr(
        loss, "HELD_LOGITS", 2**20
    )  # one chunk: with a teacher there are more, and sums in another order
    head, labels, hidden = make_head().requires_grad_(False), make_labels(), make_hidden().requires_grad_()
    results = []
    for teacher in (None, Teacher(hidden.detach().flip(1), 0.0), Teacher(hidden.detach(), 1.0)):
        each = LossHead(head)
        each.targets, each.teacher = labels, teacher
        got = each(hidden)
        results.append((got, *torch.autograd.grad(got, hidden)))
    text, nothing, itself = results
    assert all(torch.equal(*pair) for pair in zip(text, nothing, strict=True))
    assert not any(result.any() for result in itself)


FAULTS = BitFlipSpec(w_p_frac=0.01, x_p_frac=0.01, w_zero_out_t=0.5, x_zero_out_t=64.0)
"""The guard zeroes clean weights too: the teacher is without it."""


def faulty(model, sites=("linear",)):
    """With adapters that have learnt something."""
    spec = BitFlipSpec(**{**vars(FAULTS), "sites": sites})
    flipproof.inject(model, spec, LoraSpec(r=2))
    for _, layer in iter_faulty(model):
        nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("makes", ["a head", "a faulty head", "a soft cap"])
def test_the_teacher_is_the_model_before_it_had_faults_and_adapters(telling_llama, tiny_llama, token_ids, makes):
    """Against another model, without dropout, and whole logits; as if it were never asked where draws are concerned."""
    sites = ("linear", "head") if makes == "a faulty head" else ("linear",)

    def made():
        if makes == "a soft cap":
            return _tiny("Gemma2", final_logit_softcapping=0.05, attention_dropout=0.3).train()
        model = tiny_llama(attention_dropout=0.3).train()
        model.load_state_dict(telling_llama.state_dict())
        return model

    clean, student, twin = made().eval(), faulty(made(), sites), faulty(made(), sites)
    labels = token_ids.clone()
    labels[0, :7] = IGNORED
    fuse_loss(student)
    assert (type(student.get_output_embeddings()) is LossHead) == (makes == "a head")
    with torch.no_grad():
        others = clean(token_ids).logits

    def graded(model, loss):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [loss.detach().double(), *torch.autograd.grad(loss, parameters)]

    flipproof.set_tick(student, 5)
    student.model.norm.eval()
    for tick in (5, 6):
        torch.manual_seed(tick)
        teacher = ask_teacher(student, token_ids, 0.4)
        assert student.training
        assert not student.model.norm.training
        assert int(fault_state(student)._next) == tick
        taught = clean.lm_head(teacher.states) if makes == "a head" else teacher.states
        assert torch.equal(taught, others)
        assert not teacher.states.requires_grad
        got = graded(student, next_token_loss(student, token_ids, labels, teacher=teacher))

        def expected(tick=tick):
            flipproof.set_tick(twin, tick)
            torch.manual_seed(tick)
            return graded(twin, distilled_by_torch(twin(token_ids).logits, others, labels, 0.4))

        assert_same_function(got, expected, twin.parameters())


def test_the_teachers_logits_are_never_held_whole_either(tiny_llama, monkeypatch):
    vocabulary, tokens = 1031, 4 * 64
    monkeypatch.setattr(loss, "HELD_LOGITS", 96 * vocabulary)
    ids = torch.randint(0, vocabulary, (4, 65), generator=torch.Generator().manual_seed(0))
    model = faulty(tiny_llama(vocab_size=vocabulary))
    fuse_loss(model)
    with _Largest(vocabulary) as largest:
        teacher = ask_teacher(model, ids, 0.5)
        assert largest.logits == 0
        next_token_loss(model, ids, teacher=teacher).backward()
    assert teacher.states.shape == (4, 65, 32)
    assert largest.logits == 48 * vocabulary  # of each of the two
    assert largest.numel < tokens * vocabulary / 4
