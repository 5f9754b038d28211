"""What decoding is compared with: the output of transformers' own `generate`, and the target's distribution of two tokens."""

import torch

from data_prep.decoding.sampling import distribution


def generated(target, prompt, new_tokens, end=None):
    """New tokens of greedy `generate`, without anything of ours."""
    out = target.model.generate(
        torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, eos_token_id=end, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def chi_square_p(counts, probabilities):
    """Survival function of Pearson's statistic; cells expected fewer than five times are joined."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).double()
    keep = expected > 0
    statistic = ((counts - expected)[keep] ** 2 / expected[keep]).sum()
    return float(torch.special.gammaincc(torch.tensor((keep.sum().item() - 1) / 2.0).double(), statistic / 2))


def exact_pairs(target, prompt, *sampling):
    """P(second, third token) under the target, by summing over all first tokens."""
    vocab = target.architecture.vocab_size

    def next_p(texts):
        return distribution(target.logits(target.forward(torch.tensor(texts)).last_hidden[:, -1]), *sampling).double()

    p1 = next_p([prompt])[0]
    p2 = next_p([[*prompt, a] for a in range(vocab)])
    p3 = next_p([[*prompt, a, b] for a in range(vocab) for b in range(vocab)]).view(vocab, vocab, vocab)
    return torch.einsum("a,ab,abc->bc", p1, p2, p3)
