#!/usr/bin/env python3
"""Win rate of one policy against another by the judge of an RLHF config, as it is and with the length taken out:

    python scripts/compare_policies.py --config configs/smoke/rlhf.yaml --first runs/rlhf_smoke

Both answer the config's held-out prompts. A policy is a run directory, a tinker:// path or a directory with an adapter; `--second` is the
base model unless said otherwise. `--judge` asks another reward model than the one that trained: the honest number.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ptlab import local
from ptlab.cli import guarded
from ptlab.client.service import ServiceClient
from ptlab.config import RlConfig, load_config
from ptlab.envs.judges import open_judge
from ptlab.envs.policy_comparison import PolicyComparison, compare_policies
from ptlab.envs.preference import PreferenceConfig
from ptlab.envs.preference_data import prompts_of
from ptlab.errors import ConfigError
from ptlab.recipes.models import ServiceModels, run_renderer


async def compare(config: RlConfig, env: PreferenceConfig, service_client: ServiceClient, args: argparse.Namespace) -> PolicyComparison:
    base = await service_client.create_sampling_client(base_model=config.model.name)
    models = ServiceModels(service_client, config.model, run_renderer(config.model, await asyncio.to_thread(base.get_tokenizer)))
    first, renderer = await models.open(model_path=args.first)
    second, _ = await models.open(model_path=args.second)
    prompts = prompts_of(env.data.load(config.seed).test)[: args.prompts]
    judge = await open_judge(env.judge, models)
    return await compare_policies(first, second, renderer, judge, prompts, max_tokens=config.rollout.max_tokens, seed=config.seed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="of recipe rl with env.kind preference")
    parser.add_argument("--first", required=True, metavar="POLICY")
    parser.add_argument("--second", metavar="POLICY", help="default: the base model")
    parser.add_argument("--judge", metavar="PATH", help="another reward model: its run directory")
    parser.add_argument("--prompts", type=int, default=200, metavar="N", help="most held-out prompts (default 200)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting of the config")
    args = parser.parse_args()
    judge = [f"env.judge.path={args.judge}"] if args.judge else []
    with tempfile.TemporaryDirectory() as scratch:
        config = load_config(args.config, [*args.set, *judge, f"run_dir={scratch}"])
        if not isinstance(config, RlConfig) or not isinstance(config.env, PreferenceConfig):
            raise ConfigError(f"{args.config}: needed a config of recipe rl with env.kind preference, e.g. configs/smoke/rlhf.yaml")
        with local.open_service(config) as service:
            found = asyncio.run(compare(config, config.env, service.client, args))
    wins = found.wins
    print(f"{args.first} against {args.second or 'the base model'}")
    print(f"  win rate                    {wins.rate:.3f} +- {wins.standard_error:.3f}")
    print(f"  win rate, length controlled {wins.length_controlled:.3f}")
    print(f"  tokens per reply            {found.tokens[0]:.1f} against {found.tokens[1]:.1f}")
    print(f"  KL(first || second)         {found.kl:.2f} nats per reply")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
