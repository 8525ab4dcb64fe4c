"""Training: a killed run or several processes give what one process gives; what bears loss; settings; order."""
import json
import random
import signal
import socket
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import torch
import transformers
import transformers.trainer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from ehr_r1.config import Run
from ehr_r1.inference.checkpoints import ModelError, answer_text, chat_text, load_model
from ehr_r1.profiles import PROFILES, profile
from ehr_r1.synthesis.chains import CHAINS
from ehr_r1.training import settings, streaming, trainer
from ehr_r1.training.choosing import choose_examples
from ehr_r1.training.copying import copied_share
from ehr_r1.training.examples import EXAMPLES, encode, tokens_of
from ehr_r1.training.metrics import read_metrics
from ehr_r1.training.models import new_model, train_tokenizer
from ehr_r1.training.settings import (
    BY_STAGE,
    CONFIGS,
    FOR_TRAINING,
    LOGGERS,
    SAVING,
    STAGE_EPOCHS,
    TARGETS,
    loggers,
    stage_settings,
    training_settings,
)
from ehr_r1.training.streaming import Share, streamed
from ehr_r1.training.trainer import launch, run_training, train, write_job

OURS = Path(trainer.__file__).parent/'accelerate'
CONFIGURATIONS = sorted(OURS.glob('*.yaml'))
COLOURS = ('red', 'green', 'blue', 'white')
USUAL = dict(
    batch=8,
    prompts=2,
    completions=4,
    answer_tokens=16,
    adapt_rate=3e-3,
    reinforce_rate=1e-3,
)


def questions(number):
    "Pairs of a record and a colour that does not follow from it: a trained model has the form right and errs often."
    rng = random.Random(1)

    def text():
        return f'Room {rng.randint(100, 999)}, bed {rng.randint(1, 9)}. '*rng.randint(1, 4) + 'Which colour?'

    return [(text(), rng.choice(COLOURS)) for _ in range(number)]


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    "A tiny model with random weights."
    out = tmp_path_factory.mktemp('start')
    tokenizer = train_tokenizer([text for pair in questions(100) for text in pair], 320)
    tokenizer.save_pretrained(out)
    new_model('tiny', tokenizer, 1, 256).save_pretrained(out)
    return out


def colour_examples(tokenizer):
    "160 examples of the questions, in any tokenizer."
    rows = []
    for number, (text, label) in enumerate(questions(160)):
        system = dict(role='system', content='S')
        prompt = chat_text(tokenizer, [system, dict(role='user', content=text)], 'think')
        answer = answer_text('hm', [label])
        rows.append(dict(
            sample_id=str(number),
            family='decision',
            prompt=prompt,
            answer=answer,
            label=[label],
            tokens=tokens_of(tokenizer, prompt),
            answer_tokens=tokens_of(tokenizer, answer) + 1,
        ))
    return pl.DataFrame(rows, EXAMPLES)


def prepare(out, start, stage='adapt', steps=8, arguments=None, **changes):
    "A folder that `train` can be called on."
    (out/'examples').mkdir(parents=True)
    examples = colour_examples(AutoTokenizer.from_pretrained(start))
    examples.write_parquet(out/'examples'/'examples-00000.parquet', row_group_size=30)
    more = dict(settings=arguments) if arguments else {}
    write_job(out, profile('smoke', **USUAL | changes), stage, start, steps, **more)
    return out


def weights(folder):
    return load_file(folder/'model.safetensors')


def curve(folder):
    "What was logged, without what is measured."
    lines = read_metrics(folder)
    for line in lines:
        line.pop('seconds')
        line.pop('step_time', None)
    return lines


def changed(one, two):
    "Names of weights that differ."
    return {name for name in one if (one[name] != two[name]).any()}


def distance(one, two):
    squares = [((one[name] - two[name])**2).sum() for name in one]
    return sum(squares)**.5


def same(one, two, start, lines):
    "Two trainings went the same way, and somewhere."
    assert len(read_metrics(one)) == lines
    assert curve(one) == curve(two)
    a, b = weights(one/'model'), weights(two/'model')
    assert a.keys() == b.keys()
    assert not changed(a, b)
    assert changed(weights(start), a)


# --- killed and run again

# a training that kills its own process, without a chance to tidy up, when it has finished so many steps
KILLED = '''
import os, signal, sys, transformers.trainer
class Kill(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
transformers.trainer.DEFAULT_CALLBACKS.append(Kill)
from ehr_r1.training.trainer import train
train(sys.argv[1])
'''


def checkpoints(out):
    folders = (out/'trainer').glob('checkpoint-*')
    return {int(folder.name.split('-')[1]) for folder in folders}


def killed(out, step):
    "Train up to a step; what the last checkpoint is."
    command = [sys.executable, '-c', KILLED, str(out), str(step)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert read_metrics(out)[-1]['step'] == step
    assert not (out/'model').exists()
    return max(checkpoints(out))


@pytest.fixture(scope='module')
def trained(start, tmp_path_factory):
    "A training nobody disturbs."
    out = prepare(tmp_path_factory.mktemp('trained')/'x', start, steps=60)
    train(out)
    return out


@pytest.fixture(scope='module')
def interrupted(start, tmp_path_factory):
    "The same, killed twice: between two steps, and in the middle of writing a checkpoint."
    out = prepare(tmp_path_factory.mktemp('interrupted')/'x', start, steps=60)
    assert killed(out, 33) == 30
    torn = out/'trainer'/'checkpoint-36'
    torn.mkdir()
    (torn/'model.safetensors').write_bytes(b'half')
    train(out)
    return out


def test_killed_supervised_training_comes_out_the_same(trained, interrupted, start):
    same(trained, interrupted, start, 60)


def test_supervised_training_learns(trained):
    losses = [line['loss'] for line in read_metrics(trained)]
    assert losses[-1] < losses[0]/2


def test_no_pickle_is_left_beside_a_model(trained):
    assert not list((trained/'model').glob('*.bin'))


def test_killed_reinforcement_comes_out_the_same(trained, tmp_path):
    start = trained/'model'
    whole = prepare(tmp_path/'whole', start, 'reinforce', 11)
    out = prepare(tmp_path/'killed', start, 'reinforce', 11)
    train(whole)
    lines = read_metrics(whole)
    learning = [line for line in lines if line['reward_std'] > 0 and line['grad_norm'] > 0]
    assert len(learning) > 1
    assert all(0 <= line['rewards/accuracy/mean'] <= 1 for line in lines)
    assert killed(out, 5) == 4
    train(out)
    same(whole, out, start, 11)


class Stop(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt


def test_interrupted_stage_0_comes_out_the_same(start, tmp_path, monkeypatch):
    answer = '<think>\n## Extraction\n**Room [101]**: bed 2\n</think>'
    quoting = pl.DataFrame(dict(prompt=['Room 101, bed 2.\n'], answer=[answer]))
    whole = prepare(tmp_path/'whole', start, 'base', 20, base_rate=3e-3, lora=2)
    out = prepare(tmp_path/'stopped', start, 'base', 20, base_rate=3e-3, lora=2)
    for folder in (whole, out):
        quoting.write_parquet(folder/'gate.parquet')
    train(whole)
    usual = transformers.trainer.DEFAULT_CALLBACKS
    with monkeypatch.context() as patch:
        patch.setattr(transformers.trainer, 'DEFAULT_CALLBACKS', [*usual, Stop])
        with pytest.raises(KeyboardInterrupt):
            train(out)
    assert read_metrics(out)[-1]['step'] == 7
    assert checkpoints(out) == {6}
    train(out)
    measured = 11  # copying is measured at the start and at each checkpoint; adapters come in later stages
    same(whole, out, start, 20 + measured)
    assert sum('copy' in line for line in read_metrics(out)) == measured


@pytest.mark.parametrize('steps', [1, 9, 100, 150, 250, 399, 1_234, 54_321])
@pytest.mark.parametrize('stage', CONFIGS)
def test_checkpoints_fall_on_logged_steps(stage, steps):
    "A mean over logged steps cannot be gone on with from the middle."
    config = CONFIGS[stage](profile('demo'), Path('x'), steps)
    assert config.save_steps % config.logging_steps == 0
    assert steps/20 <= config.save_steps <= max(steps/5, 1)


# --- copying

class Knows(torch.nn.Module):
    "A model that says the next token of one text, or the token after it in the vocabulary."
    device = torch.device('cpu')

    def __init__(self, ids, vocabulary, knows):
        super().__init__()
        self.ids, self.vocabulary, self.knows, self.asked = ids, vocabulary, knows, 0

    def forward(self, input_ids, attention_mask):
        assert input_ids.tolist() == [self.ids]
        self.asked += 1
        following = torch.tensor([self.ids[1:] + [0]])
        right = torch.nn.functional.one_hot(following, self.vocabulary).float()
        return SimpleNamespace(logits=right if self.knows else right.roll(1, -1))


@pytest.mark.parametrize('knows', [True, False])
def test_copying_compares_the_tokens_that_training_sees(knows):
    "A line's end may be one token with what stands before it; its first token and the answer are not asked for."
    prompt = 'Room 101, bed 2.\n'
    lines = '**Labs [2150-01-02 08:00]**: Sodium 140 mEq/L [133-145]\n**Room [2150-01-02 09:00]**: bed 2'
    answer = f'<think>\n## Extraction\n{lines}\n</think>\n\n{lines}'
    tokenizer = train_tokenizer([prompt + lines]*3, 400)
    ids = tokenizer(prompt + answer, add_special_tokens=False).input_ids
    model = Knows(ids, len(tokenizer) + 1, knows)
    found = copied_share(model, tokenizer, [(prompt, answer)])
    assert model.asked == 1
    assert found == dict(copy=float(knows), copy_numbers=float(knows))


# --- several processes

def same_but_for_rounding(one, two, start):
    "Two trainings went the same way, as far as sums in another order let them."
    for x, y in zip(read_metrics(one), read_metrics(two), strict=True):
        for name in ('step', 'num_tokens', 'learning_rate'):
            assert x[name] == y[name]
        assert x['loss'] == pytest.approx(y['loss'], abs=3e-3)  # bf16 products, added up in another order
    a, b = weights(one/'model'), weights(two/'model')
    assert distance(a, b) < .15*distance(a, weights(start))


SRUN = """#!/bin/bash
for rank in 0 1; do SLURM_NODEID=$rank "${@:3}" & done
wait -n && wait -n
"""


def test_two_machines_of_a_slurm_job_train_as_one(start, tmp_path, monkeypatch):
    one = prepare(tmp_path/'one', start)
    two = prepare(tmp_path/'two', start)
    train(one)
    (tmp_path/'srun').write_text(SRUN)  # in SLURM's place: both machines are this one
    (tmp_path/'srun').chmod(0o755)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    about = dict(SRUN=f'{tmp_path}/srun --nodes=2 --ntasks-per-node=1', FIRST='127.0.0.1', PORT=port, PROCESSES=2,
                 ACCELERATE='two_processes_cpu')
    for name, value in about.items():
        monkeypatch.setenv(f'EHR_R1_{name}', str(value))
    monkeypatch.setenv('SLURM_NNODES', '2')
    launch(two)
    same_but_for_rounding(one, two, start)


def test_on_a_gpu_a_training_has_a_process_of_its_own(start, tmp_path, monkeypatch):
    here, alone = prepare(tmp_path/'here', start), prepare(tmp_path/'alone', start)
    train(here)
    monkeypatch.setattr(trainer, 'has_gpu', lambda: True)  # the process that is begun finds none, and trains as here
    monkeypatch.setattr(trainer, 'train', lambda *_: pytest.fail('trained in this process'))
    launch(alone)
    assert (alone/'model'/'model.safetensors').read_bytes() == (here/'model'/'model.safetensors').read_bytes()


def test_the_batch_file_is_a_script():
    file = OURS/'slurm.sbatch'
    assert not subprocess.run(['bash', '-n', file], check=False).returncode
    assert '# Change: ' in file.read_text()


def test_two_processes_train_as_one(start, tmp_path, monkeypatch):
    one = prepare(tmp_path/'one', start)
    two = prepare(tmp_path/'two', start)
    train(one)
    monkeypatch.setenv('EHR_R1_ACCELERATE', 'two_processes_cpu')
    launch(two)
    same_but_for_rounding(one, two, start)


@pytest.mark.parametrize('processes', [1, 2, 4, 8])
@pytest.mark.parametrize('stage, sequences', [('adapt', 8), ('reason', 64), ('reinforce', 64)])
def test_a_step_is_as_large_on_any_number_of_processes(monkeypatch, stage, sequences, processes):
    monkeypatch.setattr(settings, 'processes', lambda: processes)
    monkeypatch.setattr(TrainingArguments, 'world_size', property(lambda self: processes))
    config = CONFIGS[stage](profile('paper'), Path('x'), 100)
    assert config.per_device_train_batch_size == 1
    assert config.gradient_accumulation_steps*processes == sequences


def test_a_step_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setattr(settings, 'processes', lambda: 16)
    with pytest.raises(ValueError, match='8 sequences a step do not divide into 16 processes'):
        CONFIGS['adapt'](profile('paper'), Path('x'), 100)


KINDS = dict(  # type, processes, machines
    one_gpu=('NO', 1, 1),
    eight_gpus_zero3=('DEEPSPEED', 8, 1),
    eight_gpus_fsdp=('FSDP', 8, 1),
    several_nodes=('FSDP', 32, 4),
    two_processes_cpu=('MULTI_GPU', 2, 1),
)


def as_accelerate_reads(file):
    "The configuration of a file, and the arguments that the launcher makes of it."
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    config = load_config_from_file(str(file))  # unknown keys of the file are an error
    known = launch_command_parser().parse_args(['--config_file', str(file), 'x'])
    for part in (config.deepspeed_config, config.fsdp_config):
        assert [name for name in part if not hasattr(known, name)] == []
    return config, _validate_launch_command(known)[0]


@pytest.mark.parametrize('file', CONFIGURATIONS, ids=lambda file: file.stem)
def test_accelerate_takes_the_configuration(file):
    config, args = as_accelerate_reads(file)
    kind, processes, machines = KINDS[file.stem]
    assert args.mixed_precision == 'bf16'
    assert config.num_processes % config.num_machines == 0
    assert config.distributed_type.name == kind
    assert args.num_processes == processes
    assert args.num_machines == machines
    assert args.use_deepspeed == (kind == 'DEEPSPEED')
    assert args.use_fsdp == (kind == 'FSDP')


def test_deepspeed_takes_sizes_from_the_profile_and_leaves_one_file():
    _, args = as_accelerate_reads(next(file for file in CONFIGURATIONS if file.stem == 'eight_gpus_zero3'))
    assert args.zero_stage == 3
    assert args.gradient_accumulation_steps is None
    assert args.zero3_save_16bit_model


@pytest.mark.parametrize('name', ['eight_gpus_fsdp', 'several_nodes'])
def test_fsdp_is_the_second_and_leaves_one_file(name):
    _, args = as_accelerate_reads(next(file for file in CONFIGURATIONS if file.stem == name))
    assert args.fsdp_version == 2
    assert args.fsdp_state_dict_type == 'FULL_STATE_DICT'


@pytest.mark.parametrize('file', CONFIGURATIONS, ids=lambda file: file.stem)
def test_a_configuration_says_what_it_is_and_what_to_change(file):
    text = file.read_text()
    assert text.startswith('# ')
    assert '# Change: ' in text


def test_all_configurations_are_there():
    assert {file.stem for file in CONFIGURATIONS} == set(KINDS)


def test_a_missing_configuration_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv('EHR_R1_ACCELERATE', str(tmp_path/'none.yaml'))
    with pytest.raises(ValueError, match='EHR_R1_ACCELERATE.*none.yaml'):
        launch(tmp_path)


# --- what is learned from

def first_step(out, tokenizer):
    "The sequences of the first step of a small model's training."
    return islice(streamed(out/'examples', 42, tokenizer, True, 8), 8)


def losses_of(model, ids):
    "The loss of each token but the first."
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction='none')


def test_loss_is_on_the_assistants_tokens_alone(trained, tmp_path):
    # the first rate of a warm-up is 0: the loss is that of the start
    out = prepare(tmp_path/'x', trained/'model', 'warmup', steps=1, arguments=dict(batch=8))
    train(out)
    model = AutoModelForCausalLM.from_pretrained(trained/'model').eval()
    tokenizer = AutoTokenizer.from_pretrained(trained/'model')
    all_losses, of_assistant = [], []
    for sequence in first_step(out, tokenizer):
        text = tokenizer.decode(sequence['input_ids'])
        begin = text.index('<|im_start|>assistant\n') + len('<|im_start|>assistant\n')
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert encoded.input_ids == sequence['input_ids']
        losses = losses_of(model, torch.tensor(encoded.input_ids))
        said = torch.tensor([first >= begin for first, _ in encoded.offset_mapping])[1:]
        all_losses.append(losses)
        of_assistant.append(losses[said])
    logged = read_metrics(out)[0]['loss']
    expected = torch.cat(of_assistant).mean().item()
    of_all = torch.cat(all_losses).mean().item()
    assert logged == pytest.approx(expected, abs=.01)
    assert abs(logged - of_all) > .3


def short_and_long_answers(out, tokenizer):
    "Make every other answer one word and the others as long as their prompts; the loss-bearing tokens of each."
    file = out/'examples'/'examples-00000.parquet'
    even = pl.int_range(pl.len()) % 2 == 0
    answer = pl.when(even).then(pl.lit('red')).otherwise('prompt')
    rows = pl.read_parquet(file).with_columns(answer=answer)
    encoded = [encode(row, tokenizer) for row in rows.to_dicts()]
    sizes = [sum(x['completion_mask']) for x in encoded]
    tokens = pl.Series(sizes, dtype=pl.Int32)
    rows.with_columns(answer_tokens=tokens).write_parquet(file)
    return sizes


@pytest.mark.parametrize('micro_batch', [0, 2])
@pytest.mark.parametrize('stage', ['adapt', 'reason'])
def test_what_a_sample_weighs_in_stages_1_and_2_of_a_small_model(start, tmp_path, monkeypatch, stage, micro_batch):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(start), AutoTokenizer.from_pretrained(start)
    out = prepare(tmp_path/'x', start, stage, steps=1, micro_batch=micro_batch, record_loss=0.)
    sizes = short_and_long_answers(out, tokenizer)
    monkeypatch.setattr(streaming, 'WINDOW', 1)  # short and long ones in one step
    train(out)
    bearing = []
    for sequence in first_step(out, tokenizer):
        bears = torch.tensor(sequence['completion_mask'][1:], dtype=torch.bool)
        bearing.append(losses_of(model, torch.tensor(sequence['input_ids']))[bears])
    average = sum(sizes)/len(sizes)
    usual = sum(max(size, average) for size in sizes)/len(sizes)
    alike = stage == 'adapt'
    factors = [1 if alike else max(len(losses), average)/usual for losses in bearing]
    means = [losses.mean().item() for losses in bearing]
    expected = sum(mean*factor for mean, factor in zip(means, factors))/8
    by_tokens = torch.cat(bearing).mean().item()
    found = read_metrics(out)[0]['loss']
    assert (len(set(factors)) == 1) == alike
    assert found == pytest.approx(expected, rel=.0005)
    assert abs(by_tokens/found - 1) > .0015


def test_in_stage_1_of_a_small_model_the_record_bears_loss_too(start, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(start), AutoTokenizer.from_pretrained(start)
    out = prepare(tmp_path/'x', start, 'adapt', steps=1, record_loss=.25)
    train(out)
    losses, weights = [], []
    for sequence in first_step(out, tokenizer):
        ids = sequence['input_ids']
        begin = max(place for place, token in enumerate(ids) if tokenizer.decode([token]) == '<|im_start|>')
        losses.append(losses_of(model, torch.tensor(ids)))
        weights.append(torch.where(torch.arange(1, len(ids)) < begin, .25, 1.))
    losses, weights = torch.cat(losses), torch.cat(weights)
    expected = ((losses*weights).sum()/weights.sum()).item()
    assert read_metrics(out)[0]['loss'] == pytest.approx(expected, rel=.0005)
    assert abs(losses.mean().item()/expected - 1) > .0015


@pytest.fixture(scope='module')
def streams(start, tmp_path_factory):
    "384 sequences as they come, the same dealt out by length, and these once more."
    out = prepare(tmp_path_factory.mktemp('streams')/'x', start)
    tokenizer = AutoTokenizer.from_pretrained(start)

    def first(each):
        stream = streamed(out/'examples', 42, tokenizer, True, each)
        return [sequence['input_ids'] for sequence in islice(stream, 384)]

    return first(0), first(8), first(8)


def padded(rows):
    "Places of steps of eight sequences, for each token."
    lengths = [len(row) for row in rows]
    longest = [max(lengths[k:k + 8]) for k in range(0, len(rows), 8)]
    return 8*sum(longest)/sum(lengths)


def test_sequences_of_a_step_are_alike_in_length(streams):
    came, dealt, _ = streams
    assert padded(dealt[:256]) < 1.1 < padded(came[:256])


def test_no_sequence_is_lost_and_steps_are_in_a_drawn_order(streams):
    came, dealt, _ = streams
    many = 8*streaming.WINDOW
    for k in range(0, 384, many):
        assert sorted(dealt[k:k + many]) == sorted(came[k:k + many])
    assert dealt[:many] != sorted(came[:many], key=len)


def test_the_order_of_steps_is_the_same_each_time(streams):
    _, dealt, again = streams
    assert dealt == again


# --- adapters

@pytest.fixture(scope='module')
def adapted(start, tmp_path_factory):
    "A training of adapters of rank 3."
    out = prepare(tmp_path_factory.mktemp('adapted')/'x', start, steps=6, lora=3)
    train(out)
    return out


def test_lora_changes_the_projections_alone(start, adapted):
    before, after = weights(start), weights(adapted/'model')
    named = TARGETS.split()
    targets = {name for name in before if name.split('.')[-2] in named}
    assert before.keys() == after.keys()
    assert changed(before, after) == targets
    assert len(targets) == 14


def test_lora_changes_what_its_rank_allows(start, adapted):
    before, after = weights(start), weights(adapted/'model')
    for name in changed(before, after):
        change = after[name] - before[name]
        sizes = torch.linalg.svdvals(change.double())
        assert sizes[2] > 1e-5, name
        assert sizes[3] < 1e-2*sizes[2], name


def test_lora_leaves_a_whole_model_that_says_the_same(adapted):
    merged, tokenizer = load_model(adapted/'model', device='cpu')
    with_adapter, _ = load_model(adapted/'adapter', device='cpu')
    ids = tokenizer('Room 101', return_tensors='pt').input_ids
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, with_adapter(ids).logits, atol=1e-4)
    assert not (adapted/'model'/'adapter_config.json').exists()


def test_lora_leaves_no_pickle(adapted):
    assert not list(adapted.glob('*/training_args.bin'))


# --- settings

@pytest.fixture(scope='module')
def paper():
    "The configurations of the paper's three stages."
    p = profile('paper')
    return {stage: CONFIGS[stage](p, Path('x'), 1_000) for stage in STAGE_EPOCHS}


def test_paper_profile_has_the_papers_rates(paper):
    rates = {stage: config.learning_rate for stage, config in paper.items()}
    assert rates == dict(adapt=2e-5, reason=2e-5, reinforce=2e-6)


def test_paper_profile_has_the_papers_sizes():
    p = profile('paper')
    assert p.batch == 8
    assert p.reason_batch == 64
    assert (p.prompts, p.completions) == (4, 16)
    assert p.lora == 0
    assert p.context == 8_192
    assert p.context + p.answer_tokens == 12_288  # longest of stages 1 and 2


def test_paper_profile_trains_for_the_papers_epochs():
    p = profile('paper')
    assert STAGE_EPOCHS == dict(adapt=1, reason=5, reinforce=1)
    assert p.adapt_steps == p.reason_steps == p.reinforce_steps == 0


@pytest.mark.parametrize('stage', STAGE_EPOCHS)
def test_paper_profile_has_the_papers_schedule(paper, stage):
    config = paper[stage]
    assert config.lr_scheduler_type == 'cosine'
    assert config.warmup_steps == 30
    assert config.bf16
    assert config.gradient_checkpointing


@pytest.mark.parametrize('stage', ['adapt', 'reason'])
def test_supervised_stages_are_cut_before_and_bear_loss_on_answers(paper, stage):
    assert paper[stage].max_length is None
    assert paper[stage].completion_only_loss


def test_paper_profile_has_the_papers_sampling(paper):
    config = paper['reinforce']
    assert config.num_generations == 16
    assert config.temperature == .7
    assert (config.top_p, config.top_k) == (.95, 20)
    assert config.beta == 0
    assert config.max_completion_length == 2_048
    assert config.reward_weights in (None, [1., 1.])
    assert config.num_iterations == 1


def test_adapters_are_on_all_projections():
    projections = [name.removesuffix('_proj') for name in TARGETS.split()]
    assert sorted(projections) == ['down', 'gate', 'k', 'o', 'q', 'up', 'v']


@pytest.mark.parametrize('name', PROFILES)
@pytest.mark.parametrize('stage', CONFIGS)
def test_a_configuration_reads_the_settings_of_its_stage_alone(stage, name):
    p = profile(name)
    from_settings = CONFIGS[stage](training_settings(p, stage), Path('x'), 10)
    from_all = CONFIGS[stage](p, Path('x'), 10)
    assert from_settings.to_dict() == from_all.to_dict()


def test_a_job_holds_what_its_training_reads(start, tmp_path):
    out = prepare(tmp_path/'x', start, 'reason')
    job = json.loads((out/'job.json').read_text())
    assert set(job) == {'stage', 'start', 'steps', 'profile'}
    assert set(job['profile']) == {*FOR_TRAINING, *BY_STAGE['reason'], *SAVING}


def test_a_finished_training_leaves_its_model_and_no_job(start, tmp_path):
    out = prepare(tmp_path/'x', start)
    counts = run_training(out, profile('smoke', **USUAL), 'adapt', start, 2, 17)
    assert {file.name for file in out.iterdir()} == {'examples', 'model', 'metrics.jsonl'}
    first, last = read_metrics(out)
    expected = dict(parameters=17, steps=2, first=first['loss'], last=last['loss'])
    assert counts == expected | dict(compiled=False)


@pytest.mark.parametrize('changes, stage, said', [
    (dict(batch=10, micro_batch=4), 'adapt', 'batch'),
    (dict(reason_batch=6, micro_batch=4), 'reason', 'reason_batch'),
    (dict(prompts=3, completions=3, micro_batch=2), 'reinforce', 'completions'),
    (dict(batch=0), 'adapt', 'batch'),
    (dict(reason_batch=0), 'reason', 'reason_batch'),
    (dict(prompts=0), 'reinforce', 'prompts'),
    (dict(completions=1), 'reinforce', 'completions|generations'),
    (dict(lora=-1), 'adapt', 'lora'),
    (dict(adapt_rate=-1.), 'adapt', 'adapt_rate'),
    (dict(adapt_rate='fast'), 'adapt', 'fast'),
    (dict(ablations='no_sense'), 'reason', 'no_sense'),
    (dict(scaling='1.5'), 'adapt', 'scaling'),
])
def test_bad_settings_are_named(changes, stage, said):
    with pytest.raises(ValueError, match=said):
        CONFIGS[stage](profile('demo', **changes), Path('x'), 10)


def test_a_model_that_is_not_there_is_named(start, tmp_path):
    out = prepare(tmp_path/'x', start)
    write_job(out, profile('smoke', **USUAL), 'adapt', tmp_path/'gone', 8)
    with pytest.raises(ModelError, match='gone: no such folder'):
        train(out)


# --- which samples, in what order

@pytest.fixture
def answers(tmp_path):
    "A run of 300 samples of one task in three files, a tenth of them for tuning; the answer of each."
    run, rng = Run('r', tmp_path), random.Random(2)
    (run.samples/'ehr_ins').mkdir(parents=True)
    rows = pl.DataFrame(dict(
        sample_id=[str(i) for i in range(300)],
        label=[['x'*rng.randint(1, 30)]*rng.randint(1, 3) for _ in range(300)],
        split=['tuning', *['train']*9]*30,
    ))
    rows = rows.with_columns(task=pl.lit('t'), family=pl.lit('decision'))
    for k in range(3):
        rows[100*k:100*k + 100].write_parquet(run.samples/'ehr_ins'/f'{k}.parquet')
    return run, dict(rows.select('sample_id', 'label').rows())


def chosen_ids(run, seed=7, curriculum=False):
    return choose_examples(run, 'adapt', seed, '', curriculum)['sample_id'].to_list()


def test_the_curriculum_puts_short_answers_first(answers):
    run, labels = answers
    chosen = chosen_ids(run, curriculum=True)
    sizes = [len('\n'.join(labels[i])) for i in chosen]
    assert sizes == sorted(sizes)


def test_all_training_samples_are_chosen_and_no_others(answers):
    run, labels = answers
    training = {i for i in labels if int(i) % 10}
    assert set(chosen_ids(run)) == set(chosen_ids(run, curriculum=True)) == training


def test_the_order_is_drawn_by_the_seed(answers):
    run, _ = answers
    drawn = chosen_ids(run)
    assert drawn == chosen_ids(run)
    assert drawn != sorted(drawn, key=int)
    assert drawn != chosen_ids(run, curriculum=True)
    assert drawn != chosen_ids(run, seed=8)


SIZES_OF_TASKS = dict(many=90, few=31, rare=2)
THOUGHT = [f'few-{i}' for i in range(20)]


@pytest.fixture
def scarce(tmp_path):
    "A run of decisions of three tasks and of risks, with chains of one task; its samples."
    run = Run('r', tmp_path)
    (run.samples/'ehr_ins').mkdir(parents=True)
    run.chains.mkdir()
    rows = [dict(sample_id=f'{task}-{i}', task=task, family='decision')
            for task, number in SIZES_OF_TASKS.items() for i in range(number)]
    rows += [dict(sample_id=f'risk-{i}', task='risk', family='risk') for i in range(50)]
    label = pl.lit(['yes'], pl.List(pl.String))
    rows = pl.DataFrame(rows).with_columns(split=pl.lit('train'), label=label)
    rows.write_parquet(run.samples/'ehr_ins'/'0.parquet')
    chain = dict.fromkeys(CHAINS) | dict(
        task='few',
        split='train',
        variant='knowledge',
        attempt=0,
        chain='C',
        fault='',
    )
    chains = [chain | dict(sample_id=sample_id) for sample_id in THOUGHT]
    pl.DataFrame(chains, CHAINS).write_parquet(run.chains/'shard-0.parquet')
    return run, rows


VARIANTS_OF_STAGE_2 = pytest.mark.parametrize('variant', ['knowledge', 'plain'])


def thought_and_rest(scarce, variant, plain_share=.5):
    "What a model thinks about in stage 2, and what it answers without, in order."
    run, rows = scarce
    chosen = choose_examples(run, 'reason', 7, variant, plain_share=plain_share).with_row_index('place')
    chosen = chosen.join(rows, on='sample_id', maintain_order='left')
    thinks = pl.col('chain').is_not_null()
    return chosen.filter(thinks), chosen.filter(~thinks)


@VARIANTS_OF_STAGE_2
@pytest.mark.parametrize('plain_share', [.2, .5, .7])
def test_so_many_are_answered_without_thinking_and_two_of_three_are_risks(scarce, variant, plain_share):
    thought, rest = thought_and_rest(scarce, variant, plain_share)
    assert abs(len(rest)/(len(rest) + len(thought)) - plain_share) < .1
    assert rest['sample_id'].n_unique() == len(rest)
    assert not set(rest['sample_id']) & set(thought['sample_id'])
    decisions = rest.filter(pl.col('family') == 'decision')
    assert len(rest) == 3*len(decisions) > 0


@VARIANTS_OF_STAGE_2
def test_stage_2_thinks_about_the_teachers_chains_alone(scarce, variant):
    thought, rest = thought_and_rest(scarce, variant)
    left = set(THOUGHT) - set(rest['sample_id'])
    assert set(thought['sample_id']) == left
    assert len(left) > len(THOUGHT)/2


def test_without_plain_ones_all_chains_are_thought_about(scarce):
    thought, rest = thought_and_rest(scarce, 'knowledge', 0)
    assert sorted(thought['sample_id']) == sorted(THOUGHT)
    assert rest.is_empty()


# --- who is told, and what is left on the way

def test_a_logger_that_is_not_known_or_not_here_is_told(monkeypatch):
    monkeypatch.setenv('LOG', 'tensorbord')
    with pytest.raises(ValueError, match='tensorboard'):
        loggers()
    monkeypatch.setenv('LOG', 'wandb')
    monkeypatch.setitem(LOGGERS, 'wandb', 'no_such_package')
    with pytest.raises(ImportError, match='EXTRA=log'):
        loggers()


def test_what_is_left_on_the_way_is_no_part_of_a_key():
    usual, other = profile('smoke'), profile('smoke', save_minutes=1, keep_checkpoints=3, log_steps=7)
    assert stage_settings(usual, 'adapt') == stage_settings(other, 'adapt')
    assert training_settings(other, 'adapt').save_minutes == 1
    assert CONFIGS['adapt'](training_settings(other, 'adapt'), Path('x/y/z'), 100).logging_steps == 7


def test_processes_share_the_sequences_between_them(tmp_path):
    rows = [dict(prompt='a'*(1 + i % 9), answer='b') for i in range(60)]
    pl.DataFrame(rows).write_parquet(tmp_path/'examples-00000.parquet')
    tokenizer = train_tokenizer(['a b']*9, 300)
    whole = list(islice(streamed(tmp_path, 1, tokenizer, True), 48))
    parts = [list(islice(streamed(tmp_path, 1, tokenizer, True, share=Share((rank,), 3, 2)), 16)) for rank in range(3)]
    together = [parts[step % 3][2*(step//3) + place] for step in range(24) for place in range(2)]
    assert together == whole
    assert list(islice(streamed(tmp_path, 1, tokenizer, True, first=7), 41)) == whole[7:]
