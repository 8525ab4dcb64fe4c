"""Training: several processes or a killed run give what one undisturbed process gives; loss-bearing tokens; settings; order."""
import json, random, signal, subprocess, sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
import polars as pl, pytest, torch
from ehr_r1.config import Run
from ehr_r1.profiles import profile
from ehr_r1.synthesis.chains import CHAINS
from ehr_r1.training.examples import AGAIN, EXAMPLES, choose_examples, encode
from ehr_r1.training import stages
from ehr_r1.inference.checkpoints import ModelError, answer_text, chat_text
from ehr_r1.training.models import new_model, train_tokenizer
from ehr_r1.training.stages import CONFIGS, EPOCHS, TARGETS, _encoded, _launch, copying, read_metrics, train

CONFIGURATIONS = sorted((Path(__file__).parent.parent/'ehr_r1'/'training'/'accelerate').glob('*.yaml'))
COLOURS = ('red', 'green', 'blue', 'white')

def questions(n):
    "Pairs of a record and a colour that does not follow from it, so that a trained model has the form right and errs often."
    rng = random.Random(1)
    def text(): return f'Room {rng.randint(100, 999)}, bed {rng.randint(1, 9)}. '*rng.randint(1, 4) + 'Which colour?'
    return [(text(), rng.choice(COLOURS)) for _ in range(n)]

@pytest.fixture(scope='module')
def start(tmp_path_factory):
    "A tiny model with random weights."
    out = tmp_path_factory.mktemp('start')
    tokenizer = train_tokenizer([t for pair in questions(100) for t in pair], 320)
    tokenizer.save_pretrained(out)
    new_model('tiny', tokenizer, 1, 256).save_pretrained(out)
    return out

def prepare(out, start, stage='adapt', steps=8, **changes):
    "A folder that `train` can be called on."
    from transformers import AutoTokenizer
    tokenizer, rows = AutoTokenizer.from_pretrained(start), []
    def count(text): return len(tokenizer(text, add_special_tokens=False).input_ids)
    for i, (text, label) in enumerate(questions(160)):
        prompt = chat_text(tokenizer, [dict(role='system', content='S'), dict(role='user', content=text)], 'think')
        answer = answer_text('hm', [label])
        rows.append((str(i), 'colour', 'decision', 'think', prompt, answer, [label], count(prompt), count(answer) + 1, 0))
    (out/'examples').mkdir(parents=True)
    pl.DataFrame(rows, schema=EXAMPLES, orient='row').write_parquet(out/'examples'/'examples-00000.parquet', row_group_size=30)
    usual = dict(batch=8, prompts=2, completions=4, answer_tokens=16, adapt_rate=3e-3, reinforce_rate=1e-3)
    p = profile('smoke', **usual | changes)
    (out/'job.json').write_text(json.dumps(dict(stage=stage, start=str(start), steps=steps, profile=asdict(p))))
    return out

def weights(folder):
    from safetensors.torch import load_file
    return load_file(folder/'model.safetensors')

def curve(folder):
    "What was logged, without what is measured."
    return [{k: v for k, v in line.items() if k not in ('seconds', 'step_time')} for line in read_metrics(folder)]

# a training that kills its own process, without a chance to tidy up, when it has finished so many steps
KILLED = '''
import os, signal, sys, transformers.trainer
class Kill(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == int(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)
transformers.trainer.DEFAULT_CALLBACKS.append(Kill)
from ehr_r1.training.stages import train
train(sys.argv[1])
'''
def killed(out, step):
    "Train up to a step; what the last checkpoint is."
    done = subprocess.run([sys.executable, '-c', KILLED, str(out), str(step)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert read_metrics(out)[-1]['step'] == step and not (out/'model').exists()
    return max(int(c.name.split('-')[1]) for c in (out/'trainer').glob('checkpoint-*'))

def same(a, b, start, lines):
    "Two trainings went the same way, and somewhere."
    assert len(read_metrics(a)) == lines
    for x, y in zip(curve(a), curve(b), strict=True): assert x == y
    one, two, old = weights(a/'model'), weights(b/'model'), weights(start)
    assert one.keys() == two.keys() and all((one[k] == two[k]).all() for k in one)
    assert any((one[k] != old[k]).any() for k in old)

@pytest.fixture(scope='module')
def trained(start, tmp_path_factory):
    "A training nobody disturbs."
    out = prepare(tmp_path_factory.mktemp('trained')/'x', start, steps=60)
    train(out)
    return out

# --- killed and run again

@pytest.mark.parametrize('knows', (True, False))
def test_copying_compares_the_tokens_that_training_sees(knows):
    "A line's end may be one token with what stands before it; the first token of a line is not asked for, nor is the answer."
    prompt, lines = 'Room 101, bed 2.\n', ['**Labs [2150-01-02 08:00]**: Sodium 140 mEq/L [133-145]', '**Room [2150-01-02 09:00]**: bed 2']
    said = '\n'.join(lines)
    tokenizer = train_tokenizer([prompt + said]*3, 400)
    answer = f'<think>\n## Extraction\n{said}\n</think>\n\n{said}'
    ids = tokenizer(prompt + answer, add_special_tokens=False).input_ids
    asked = []
    class Model(torch.nn.Module):
        device = torch.device('cpu')
        def forward(self, input_ids, attention_mask):
            assert input_ids.tolist() == [ids]; asked.append(1)
            right = torch.nn.functional.one_hot(torch.tensor([ids[1:] + [0]]), len(tokenizer) + 1).float()
            return SimpleNamespace(logits=right if knows else right.roll(1, -1))
    found = copying(Model(), tokenizer, [(prompt, answer)])
    assert asked and found == dict(copy=float(knows), copy_numbers=float(knows))

def test_killed_supervised_training_comes_out_the_same(trained, start, tmp_path):
    out = prepare(tmp_path/'x', start, steps=60)
    assert killed(out, 33) == 30
    torn = out/'trainer'/'checkpoint-36' # a second kill, in the middle of writing the next checkpoint
    torn.mkdir()
    (torn/'model.safetensors').write_bytes(b'half')
    train(out)
    same(trained, out, start, 60)
    lost = [line['loss'] for line in read_metrics(out)]
    assert lost[-1] < lost[0]/2

def test_killed_reinforcement_comes_out_the_same(trained, tmp_path):
    whole, out = (prepare(tmp_path/name, trained/'model', 'reinforce', 11) for name in ('whole', 'killed'))
    train(whole)
    lines = read_metrics(whole)
    assert sum(line['reward_std'] > 0 and line['grad_norm'] > 0 for line in lines) > 1 # there is something to learn from
    assert all(0 <= line['rewards/accuracy/mean'] <= 1 for line in lines)
    assert killed(out, 5) == 4
    train(out)
    same(whole, out, trained/'model', 11)

def test_interrupted_stage_0_comes_out_the_same(start, tmp_path, monkeypatch):
    import transformers.trainer
    whole, out = (prepare(tmp_path/name, start, 'base', 20, base_rate=3e-3, lora=2) for name in ('whole', 'stopped'))
    quoted = pl.DataFrame(dict(prompt=['Room 101, bed 2.\n'], answer=['<think>\n## Extraction\n**Room [101]**: bed 2\n</think>']))
    for folder in (whole, out): quoted.write_parquet(folder/'gate.parquet')
    train(whole)
    class Stop(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 7: raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(transformers.trainer, 'DEFAULT_CALLBACKS', [*transformers.trainer.DEFAULT_CALLBACKS, Stop])
        with pytest.raises(KeyboardInterrupt): train(out)
    assert read_metrics(out)[-1]['step'] == 7 and {c.name for c in (out/'trainer').glob('checkpoint-*')} == {'checkpoint-6'}
    train(out)
    same(whole, out, start, 20 + 11) # copying is measured at the start and at each checkpoint; adapters come in later stages
    assert sum('copy' in line for line in read_metrics(out)) == 11

def test_checkpoints_fall_on_logged_steps():
    "A mean over logged steps cannot be gone on with from the middle."
    for stage, make in CONFIGS.items():
        for steps in (1, 9, 100, 150, 250, 399, 1_234, 54_321):
            c = make(profile('demo'), Path('x'), steps)
            assert c.save_steps % c.logging_steps == 0, (stage, steps)
            assert steps/20 <= c.save_steps <= max(steps/5, 1), (stage, steps)

# --- several processes

def test_two_processes_train_as_one(start, tmp_path, monkeypatch):
    one, two = (prepare(tmp_path/name, start, steps=8) for name in ('one', 'two'))
    train(one)
    monkeypatch.setenv('EHR_R1_ACCELERATE', str(next(f for f in CONFIGURATIONS if f.stem == 'two_processes_cpu')))
    _launch(two)
    for x, y in zip(read_metrics(one), read_metrics(two), strict=True):
        assert x['step'] == y['step'] and x['num_tokens'] == y['num_tokens'] and x['learning_rate'] == y['learning_rate']
        assert x['loss'] == pytest.approx(y['loss'], abs=3e-3) # bf16 products, added up in another order
    a, b, old = weights(one/'model'), weights(two/'model'), weights(start)
    moved = sum(((a[k] - old[k])**2).sum() for k in a)**.5
    assert sum(((a[k] - b[k])**2).sum() for k in a)**.5 < .15*moved

@pytest.mark.parametrize('processes', [1, 2, 4, 8])
def test_a_step_is_as_large_on_any_number_of_processes(monkeypatch, processes):
    from transformers import TrainingArguments
    monkeypatch.setattr(stages, '_world', lambda: processes)
    monkeypatch.setattr(TrainingArguments, 'world_size', property(lambda self: processes))
    for stage, sequences in dict(adapt=8, reason=64, reinforce=64).items():
        c = CONFIGS[stage](profile('paper'), Path('x'), 100)
        assert c.per_device_train_batch_size*c.gradient_accumulation_steps*processes == sequences
        assert c.per_device_train_batch_size == 1

def test_a_step_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setattr(stages, '_world', lambda: 16)
    with pytest.raises(ValueError, match='8 sequences a step do not divide into 16 processes'):
        CONFIGS['adapt'](profile('paper'), Path('x'), 100)

@pytest.mark.parametrize('file', CONFIGURATIONS, ids=lambda f: f.stem)
def test_accelerate_takes_the_configuration(file):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import DistributedType
    config = load_config_from_file(str(file)) # unknown keys of the file are an error
    known = launch_command_parser().parse_args(['--config_file', str(file), 'x'])
    for part in (config.deepspeed_config, config.fsdp_config): assert all(hasattr(known, k) for k in part), 'unknown key'
    args = _validate_launch_command(known)[0]
    assert args.mixed_precision == 'bf16' and config.num_processes % config.num_machines == 0
    kind, processes, machines = dict(
        one_gpu=(DistributedType.NO, 1, 1), eight_gpus_zero3=(DistributedType.DEEPSPEED, 8, 1),
        eight_gpus_fsdp=(DistributedType.FSDP, 8, 1),
        several_nodes=(DistributedType.FSDP, 32, 4), two_processes_cpu=(DistributedType.MULTI_GPU, 2, 1))[file.stem]
    assert (config.distributed_type, args.num_processes, args.num_machines) == (kind, processes, machines)
    assert (args.use_deepspeed, args.use_fsdp) == (kind == DistributedType.DEEPSPEED, kind == DistributedType.FSDP)
    if args.use_deepspeed: # sizes are the profile's; the finished model is one file
        assert args.zero_stage == 3 and args.gradient_accumulation_steps is None and args.zero3_save_16bit_model
    if args.use_fsdp: assert args.fsdp_version == 2 and args.fsdp_state_dict_type == 'FULL_STATE_DICT'
    assert file.read_text().startswith('# ') and '# Change: ' in file.read_text()

def test_all_configurations_are_there():
    assert len(CONFIGURATIONS) == 5

def test_a_missing_configuration_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv('EHR_R1_ACCELERATE', str(tmp_path/'none.yaml'))
    with pytest.raises(ValueError, match='EHR_R1_ACCELERATE.*none.yaml'): _launch(tmp_path)

# --- what is learned from

def first_step(out, tokenizer):
    "The sequences of the first step of a small model's training."
    return islice(_encoded(out/'examples', 42, tokenizer, True, 8), 8)

def test_loss_is_on_the_assistants_tokens_alone(trained, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    out = prepare(tmp_path/'x', trained/'model', 'warmup', steps=1) # the first rate of a warm-up is 0: the loss is that of the start
    job = json.loads((out/'job.json').read_text())
    (out/'job.json').write_text(json.dumps(job | dict(settings=dict(batch=8))))
    train(out)
    model = AutoModelForCausalLM.from_pretrained(trained/'model').eval()
    tokenizer = AutoTokenizer.from_pretrained(trained/'model')
    assistant = everything = 0.
    tokens = [0, 0]
    for x in first_step(out, tokenizer):
        text = tokenizer.decode(x['input_ids'])
        begin = text.index('<|im_start|>assistant\n') + len('<|im_start|>assistant\n')
        y = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert y.input_ids == x['input_ids']
        ids, said = torch.tensor(y.input_ids), torch.tensor([a >= begin for a, _ in y.offset_mapping])
        with torch.no_grad(): logits = model(ids[None]).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[1:], reduction='none')
        assistant += loss[said[1:]].sum().item(); everything += loss.sum().item()
        tokens = [tokens[0] + int(said.sum()), tokens[1] + len(loss)]
    logged = read_metrics(out)[0]['loss']
    assert logged == pytest.approx(assistant/tokens[0], abs=.01)
    assert abs(logged - everything/tokens[1]) > 1

@pytest.mark.parametrize('micro_batch', [0, 2])
@pytest.mark.parametrize('stage', ['adapt', 'reason'])
def test_what_a_sample_weighs_in_stages_1_and_2_of_a_small_model(start, tmp_path, monkeypatch, stage, micro_batch):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    out, n = prepare(tmp_path/'x', start, stage, steps=1, micro_batch=micro_batch), pl.int_range(pl.len())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(start), AutoTokenizer.from_pretrained(start)
    file = out/'examples'/'examples-00000.parquet'
    rows = pl.read_parquet(file).with_columns(answer=pl.when(n % 2 == 0).then(pl.lit('red')).otherwise(pl.col('prompt')))
    monkeypatch.setattr(stages, 'WINDOW', 1) # short and long ones in one step
    size = pl.Series([sum(encode(r, tokenizer)['completion_mask']) for r in rows.to_dicts()], dtype=pl.Int32)
    rows = rows.with_columns(answer_tokens=size); rows.write_parquet(file)
    train(out)
    each, tokens = [], []
    for x in first_step(out, tokenizer):
        ids, bears = torch.tensor([x['input_ids']]), torch.tensor(x['completion_mask'][1:], dtype=torch.bool)
        with torch.no_grad(): said = model(input_ids=ids).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(said[bears], ids[0, 1:][bears], reduction='none')
        each.append(loss.mean().item()); tokens.append(len(loss))
    weights = [1]*8
    if stage == 'reason':
        usual = [max(t, size.mean()) for t in size]
        weights = [max(t, size.mean())/(sum(usual)/len(usual)) for t in tokens]
        assert len(set(weights)) > 1
    found, by_tokens = read_metrics(out)[0]['loss'], sum(l*t for l, t in zip(each, tokens))/sum(tokens)
    assert found == pytest.approx(sum(l*w for l, w in zip(each, weights))/8, rel=.0005) and abs(by_tokens/found - 1) > .0015

def test_sequences_of_a_step_are_alike_in_length_and_none_is_lost(start, tmp_path):
    from transformers import AutoTokenizer
    out, tokenizer = prepare(tmp_path/'x', start), AutoTokenizer.from_pretrained(start)
    def take(each, n): return [x['input_ids'] for x in islice(_encoded(out/'examples', 42, tokenizer, True, each), n)]
    def padding(rows): return sum(max(map(len, rows[k:k+8]))*8 for k in range(0, len(rows), 8))/sum(map(len, rows))
    came, dealt, many = take(0, 384), take(8, 384), 8*stages.WINDOW
    for k in range(0, 384, many): assert sorted(dealt[k:k+many]) == sorted(came[k:k+many])
    assert padding(dealt[:256]) < 1.1 < padding(came[:256]) and dealt[:many] != sorted(came[:many], key=len)
    assert dealt == take(8, 384)

def test_lora_changes_what_its_rank_allows_and_leaves_a_whole_model(start, tmp_path):
    import torch
    from ehr_r1.inference.checkpoints import load_model
    out = prepare(tmp_path/'x', start, steps=6, lora=3)
    train(out)
    before, after = weights(start), weights(out/'model')
    assert before.keys() == after.keys() and not (out/'model'/'adapter_config.json').exists()
    changed = {k for k in before if (before[k] != after[k]).any()}
    assert changed == {k for k in before if k.split('.')[-2] in TARGETS.split()} and len(changed) == 14
    for k in changed:
        s = torch.linalg.svdvals((after[k] - before[k]).double())
        assert s[2] > 1e-5 and s[3] < 1e-2*s[2], (k, s[:5])
    merged, tokenizer = load_model(out/'model', device='cpu')
    adapted, _ = load_model(out/'adapter', device='cpu')
    ids = tokenizer('Room 101', return_tensors='pt').input_ids
    with torch.no_grad(): assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-4)

# --- settings

def test_paper_profile_has_the_papers_settings():
    p = profile('paper')
    made = {stage: CONFIGS[stage](p, Path('x'), 1_000) for stage in EPOCHS}
    assert EPOCHS == dict(adapt=1, reason=5, reinforce=1)
    assert {s: c.learning_rate for s, c in made.items()} == dict(adapt=2e-5, reason=2e-5, reinforce=2e-6)
    assert (p.batch, p.reason_batch, p.prompts, p.completions, p.lora) == (8, 64, 4, 16, 0)
    assert p.adapt_steps == p.reason_steps == p.reinforce_steps == 0 # epochs rule
    for c in made.values():
        assert c.lr_scheduler_type == 'cosine' and c.warmup_steps == 30 and c.bf16 and c.gradient_checkpointing
    assert p.context == 8_192 and p.context + p.answer_tokens == 12_288 # longest of stages 1 and 2
    assert all(made[s].max_length is None and made[s].completion_only_loss for s in ('adapt', 'reason')) # cut before, not by TRL
    r = made['reinforce']
    assert (r.num_generations, r.temperature, r.top_p, r.top_k, r.beta) == (16, .7, .95, 20, 0)
    assert r.max_completion_length == 2_048
    assert r.reward_weights in (None, [1., 1.]) and r.num_iterations == 1
    assert set(TARGETS.split()) == {f'{x}_proj' for x in ('q', 'k', 'v', 'o', 'up', 'gate', 'down')}

@pytest.mark.parametrize('changes, stage, said', [
    (dict(batch=10, micro_batch=4), 'adapt', 'batch'), (dict(reason_batch=6, micro_batch=4), 'reason', 'reason_batch'),
    (dict(prompts=3, completions=3, micro_batch=2), 'reinforce', 'completions'),
    (dict(batch=0), 'adapt', 'batch'), (dict(reason_batch=0), 'reason', 'reason_batch'),
    (dict(prompts=0), 'reinforce', 'prompts'),
    (dict(completions=1), 'reinforce', 'completions|generations'), (dict(lora=-1), 'adapt', 'lora'),
    (dict(adapt_rate=-1.), 'adapt', 'adapt_rate'), (dict(adapt_rate='fast'), 'adapt', 'fast'),
    (dict(ablations='no_sense'), 'reason', 'no_sense'), (dict(scaling='1.5'), 'adapt', 'scaling')])
def test_bad_settings_are_named(changes, stage, said):
    with pytest.raises(ValueError, match=said): CONFIGS[stage](profile('demo', **changes), Path('x'), 10)

def test_a_model_that_is_not_there_is_named(start, tmp_path):
    out = prepare(tmp_path/'x', start)
    job = json.loads((out/'job.json').read_text())
    (out/'job.json').write_text(json.dumps(job | dict(start=str(tmp_path/'gone'))))
    with pytest.raises(ModelError, match='gone: no such folder'): train(out)

# --- order

def test_curriculum_puts_short_answers_first(tmp_path):
    run, rng = Run('r', tmp_path), random.Random(2)
    (run.samples/'ehr_ins').mkdir(parents=True)
    label = {str(i): ['x'*rng.randint(1, 30)]*rng.randint(1, 3) for i in range(300)}
    rows = pl.DataFrame(dict(sample_id=list(label), label=list(label.values()), split=['tuning', *['train']*9]*30))
    rows = rows.with_columns(task=pl.lit('t'), family=pl.lit('decision'))
    for k in range(3): rows[100*k:100*k+100].write_parquet(run.samples/'ehr_ins'/f'{k}.parquet')
    easy, drawn = (choose_examples(run, 'adapt', 7, '', c)['sample_id'].to_list() for c in (True, False))
    size = [len('\n'.join(label[i])) for i in easy]
    assert size == sorted(size) and set(easy) == set(drawn) == {i for i in label if int(i) % 10}
    assert easy != drawn == choose_examples(run, 'adapt', 7, '', False)['sample_id'].to_list() != sorted(drawn, key=int)
    assert drawn != choose_examples(run, 'adapt', 8, '', False)['sample_id'].to_list()

@pytest.mark.parametrize('variant', ['knowledge', 'plain'])
def test_a_small_model_thinks_about_scarce_tasks_as_often_as_about_others(tmp_path, variant):
    run, sizes = Run('r', tmp_path), dict(many=90, few=31, rare=2)
    (run.samples/'ehr_ins').mkdir(parents=True); run.chains.mkdir()
    rows = pl.DataFrame([dict(sample_id=f'{t}-{i}', task=t, family='decision') for t, n in sizes.items() for i in range(n)] +
                        [dict(sample_id=f'risk-{i}', task='risk', family='risk') for i in range(50)])
    rows = rows.with_columns(split=pl.lit('train'), label=pl.lit(['yes'], pl.List(pl.String)))
    rows.write_parquet(run.samples/'ehr_ins'/'0.parquet')
    pl.DataFrame([dict(sample_id='few-0', subject_id=1, task='few', split='train', teacher='t', variant='knowledge', attempt=0,
                       chain='C', fault='', supported=1, lines=1, prompt_tokens=0, completion_tokens=0)],
                 CHAINS).write_parquet(run.chains/'shard-0.parquet')
    chosen = choose_examples(run, 'reason', 7, variant, bare=True).join(rows, on='sample_id', maintain_order='left')
    thought = chosen.filter(pl.col('chain').is_not_null())
    rest = chosen.filter(pl.col('chain').is_null()) # answered without thinking
    assert rest['sample_id'].n_unique() == len(rest) and 'risk' in rest['task'] and not set(rest['sample_id']) & set(thought['sample_id'])
    for task, again in dict(many=1, few=2, rare=AGAIN).items(): # at most as many as of the largest, and AGAIN times
        assert len(thought.filter(task=task)) == again*(sizes[task] - len(rest.filter(task=task)))
    assert thought.filter(sample_id='few-0')['chain'].to_list() == ['C', 'C']
    places = {s: [i for i, x in enumerate(chosen['sample_id']) if x == s] for s in thought.filter(task='few')['sample_id'].unique()}
    assert all(len(p) >= 2 for p in places.values()) and sum(p[1] - p[0] > 1 for p in places.values()) > .8*len(places) # apart
    once = choose_examples(run, 'reason', 7, variant, bare=False) # a checkpoint: the teacher's chains alone
    assert once.filter(pl.col('chain').is_not_null())['sample_id'].to_list() == ['few-0']
