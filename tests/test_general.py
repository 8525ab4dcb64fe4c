"Models as they come: candidates, chat servers of all habits, official files, GGUF; what is said before it is sent."
import importlib.util
import json
import math
from dataclasses import replace

import polars as pl
import pytest
import torch
import yaml
from faulty_proxy import JSON, Proxy, some_faults
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ehr_r1.command import main
from ehr_r1.config import Run
from ehr_r1.data.index import build_index
from ehr_r1.data.official_writing import write_samples
from ehr_r1.data.samples import build_samples, rendered_in, scan_samples
from ehr_r1.data.tables import open_source
from ehr_r1.data.trajectories import build_trajectories
from ehr_r1.evaluation.general import (
    ChatPrompter,
    General,
    build_general,
    check_general,
    general_in,
    home_of,
    prompter_of,
    said_of_scores,
    samples_for,
    score_general,
    templated,
)
from ehr_r1.evaluation.joint import costs, put_together, score_joint
from ehr_r1.evaluation.sharing import build_shared, card
from ehr_r1.hospital.hospital import build_hospital
from ehr_r1.inference.chats import ChatEngine
from ehr_r1.inference.checkpoints import ModelError, chat_text, load_model
from ehr_r1.inference.endpoints import InferenceError, Refused
from ehr_r1.inference.engines import WAYS
from ehr_r1.profiles import profile
from ehr_r1.scoring import set_f1
from ehr_r1.stages import read_manifest
from ehr_r1.training.models import new_model, train_tokenizer
from ehr_r1.training.stages import build_base, model_at
from ehr_r1.transfer.benchmark_stage import build_general_benchmark
from ehr_r1.transfer.medcalc.benchmark import MEDCALC
from ehr_r1.transfer.question_sets import QUESTIONS, answered_examples, asked_questions, questions_to_asks

TASKS = 'labevents,diagnosis,ED_Hospitalization'


@pytest.fixture(scope='module')
def p():
    return profile('smoke', workers=1, lm_per_task=2)


@pytest.fixture(scope='module')
def stood(tmp_path_factory, p):
    "A run of sixty patients, up to its samples."
    home = tmp_path_factory.mktemp('general')
    build_hospital(home/'tables', 60, 42, workers=1, progress=False)
    run = Run('stood', home)
    build_trajectories(open_source(home/'tables'), run, p)
    build_index(run, p)
    build_samples(run, p)
    return run


@pytest.fixture
def run(stood, tmp_path):
    "The same run in a folder of its own, so that answers do not meet."
    again = Run('again', tmp_path)
    again.folder.mkdir(parents=True)
    for name in ('samples', 'trajectories', 'index'):
        (again.folder/name).symlink_to(stood.folder/name)
    return again


def chat(answer):
    "A chat server's reply function: `answer` makes (text, probabilities or None) of what was asked."
    def reply(method, path, body, headers):
        if method == 'GET':
            return 200, JSON, json.dumps(dict(data=[dict(id='parrot')]))
        asked = json.loads(body)
        said = answer(asked)
        if isinstance(said, str):
            return 400, JSON, json.dumps(dict(error=dict(message=said)))
        text, listed = said
        choice = dict(index=0, finish_reason='stop', message=dict(role='assistant', content=text))
        if listed and asked.get('logprobs'):
            words = [dict(token=token, logprob=math.log(share)) for token, share in listed.items()]
            choice['logprobs'] = dict(content=[dict(words[0], top_logprobs=words)])
        usage = dict(prompt_tokens=len(body)//4, completion_tokens=3)
        return 200, JSON, json.dumps(dict(model='parrot', usage=usage, choices=[choice]))
    return reply


def knows(asked):
    "Answers with the first two candidates; says yes to those who are old."
    words = asked['messages'][-1]['content']
    if words.endswith('yes or no.'):
        share = .8 if 'gender F' in words else .3
        return 'yes', {'yes': share, ' No': (1 - share)/2, 'maybe': .05}
    names = words.partition('Choose among these names:\n')[2].split('\n')
    return '1. **' + '**\n2. **'.join(names[:2]) + '**', None


def at(proxy, **more):
    return General(proxy.url, 'parrot', tasks=TASKS, **more)


def predictions(run, g):
    return pl.read_parquet(home_of(run, g)/'ehr_bench'/'predictions.parquet')


# --- what is asked

def test_the_same_samples_in_another_style(stood):
    there = scan_samples(stood, 'ehr_bench').collect().sort('subject_id', 'sample_id')
    again = rendered_in(stood, there, 'official', 8_192)
    assert again['sample_id'].equals(there['sample_id'])
    assert again['candidates'].equals(there['candidates'])
    assert again['label'].equals(there['label'])
    texts = [messages[1]['content'] for messages in again['messages']]
    assert all('## Patient Demographics [None]' in text for text in texts)
    assert not any(' p25\n' in text for text in texts)


def test_a_smaller_round_is_part_of_a_larger_one(stood, p):
    few, many = (samples_for(stood, p, General('m', tasks=TASKS, per_task=n)) for n in (1, 3))
    assert 0 < len(few) < len(many)
    assert set(few['sample_id']) < set(many['sample_id'])


def test_candidates_hold_the_answer_and_stand_in_the_prompt(run, p):
    with Proxy(chat(knows)) as proxy:
        g = at(proxy)
        build_general(run, p, g, 'hospital', 'open')
    asked = {words.rpartition('Choose among')[0]: words for words in proxy.asked()}
    for row in samples_for(run, p, g).filter(family='decision').iter_rows(named=True):
        text = row['messages'][1]['content']
        [words] = [words for begin, words in asked.items() if begin.startswith(text)]
        listed = words.partition('Choose among these names:\n')[2].split('\n')
        assert set(row['label']) <= set(listed)


def test_an_answer_is_read_leniently_and_scored(run, p):
    with Proxy(chat(knows)) as proxy:
        g = at(proxy)
        build_general(run, p, g, 'hospital', 'open')
    score_general(run, p, g)
    made = predictions(run, g)
    assert made.filter(pl.col('risk').is_null())['answer'].list.len().eq(2).all()
    counts = read_manifest(home_of(run, g)/'ehr_bench')['counts']
    assert counts['worded'] == 0
    assert .6 < counts['yes_no_mass'] < .95
    assert 'ED_Hospitalization' in said_of_scores(run, g)


# --- servers of all habits

def test_faults_of_the_server_change_nothing(run, p, tmp_path):
    with Proxy(chat(knows)) as calm:
        build_general(run, p, at(calm), 'hospital', 'open')
        expected = predictions(run, at(calm))
    (run.folder/'asked').rename(tmp_path/'calm')
    with Proxy(chat(knows), some_faults) as proxy:
        build_general(run, p, at(proxy), 'hospital', 'open')
        assert sum(proxy.faults.values()) > 3
        assert set(proxy.delivered.values()) == {1}
        assert predictions(run, at(proxy)).equals(expected)


def test_settings_that_a_server_refuses_are_left_out(run, p):
    def picky(asked):
        for name in ('temperature', 'max_tokens', 'logprobs'):
            if name in asked:
                return f"Unsupported parameter: '{name}' is not supported with this model"
        return ('Yes, I think.' if 'yes or no' in asked['messages'][-1]['content'][-60:] else 'Sodium'), None

    with Proxy(chat(picky)) as proxy:
        g = at(proxy)
        build_general(run, p, g, 'hospital', 'open')
    last = json.loads(proxy.seen[-1])
    assert 'max_completion_tokens' in last
    assert not {'temperature', 'max_tokens', 'logprobs', 'top_logprobs'} & last.keys()
    counts = read_manifest(home_of(run, g)/'ehr_bench')['counts']
    assert counts['worded'] == len(samples_for(run, p, g).filter(family='risk'))
    assert 'one threshold' in said_of_scores_after_scoring(run, p, g)


def said_of_scores_after_scoring(run, p, g):
    score_general(run, p, g)
    return said_of_scores(run, g)


def test_a_refusal_that_names_no_setting_is_told(run, p):
    with Proxy(chat(lambda asked: 'your account is closed')) as proxy, pytest.raises(InferenceError, match='is closed'):
        build_general(run, p, at(proxy), 'hospital', 'open')


@pytest.mark.parametrize('content', ['', 'null', '[]', '{"choices": []}', '<html>', '{"choices": [{"message": 3}]}'])
def test_nonsense_is_one_line_and_what_came_before_is_kept(run, p, content):
    heard = []

    def sometimes(method, path, body, headers):
        heard.append(body)
        if len(heard) == 4:
            return 200, JSON, content
        return chat(knows)(method, path, body, headers)

    g = None
    with Proxy(sometimes) as proxy:
        g = at(proxy)
        with pytest.raises(InferenceError) as error:
            build_general(run, p, g, 'hospital', 'open')
        assert '\n' not in str(error.value)
        build_general(run, p, g, 'hospital', 'open')
        assert max(proxy.delivered.values()) <= 2


def test_a_longer_round_asks_what_is_new(run, p):
    with Proxy(chat(knows)) as proxy:
        build_general(run, p, at(proxy, per_task=1), 'hospital', 'open')
        first = len(proxy.seen)
        build_general(run, p, at(proxy, per_task=3), 'hospital', 'open')
        assert first < len(proxy.seen)
        assert set(proxy.delivered.values()) == {1}


# --- before anything is sent

def test_nothing_is_sent_elsewhere_before_yes(run, p, monkeypatch):
    monkeypatch.setattr(ChatEngine, 'ask', lambda *_: pytest.fail('something was sent'))
    g = General('https://api.example.org/v1', 'gpt-4o', tasks=TASKS, price='2.5,10')
    with pytest.raises(Refused, match=r'prompts, about .* tokens to read, at most .* \$ .*yes=1'):
        build_general(run, p, g, 'hospital', 'open')


def test_credentialed_text_stays_even_with_yes(run, p, monkeypatch):
    monkeypatch.setattr(ChatEngine, 'ask', lambda *_: pytest.fail('something was sent'))
    g = General('https://api.example.org/v1', 'gpt-4o', tasks=TASKS, yes=True)
    with pytest.raises(Refused, match='EHR_R1_ALLOW'):
        build_general(run, p, g, 'mimic-iv-3.1', 'credentialed')


@pytest.mark.parametrize('words, said', [
    (dict(), 'model='),
    (dict(model='http://127.0.0.1:1/v1'), 'give name='),
    (dict(model='m', style='binned'), 'compact or official'),
    (dict(model='m', tasks='death'), "none of EHR-Bench's tasks"),
    (dict(model='m', bench='nowhere.jsonl'), 'no such file'),
    (dict(model='m', template='nowhere.jinja'), 'no such file'),
    (dict(model='m', price='cheap'), 'dollars for a million'),
    (dict(model='m', think='perhaps'), 'neither true nor false'),
])
def test_a_wrong_word_is_told_before_anything_runs(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv('EHR_R1_HOME', str(tmp_path))
    with pytest.raises(ValueError, match=said):
        general_in(dict(words))
    assert main(['evaluate', 'profile=smoke', *(f'{name}={value}' for name, value in words.items())]) != 0
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- an official file

def test_an_official_file_needs_no_tables_and_keeps_its_instruction(stood, tmp_path, monkeypatch, capsys):
    own = 'Which of the laboratory tests shall be done? Say it plainly.'
    rows = scan_samples(stood, 'ehr_bench').filter(pl.col('task') == 'labevents').head(3).collect()
    file = tmp_path/'bench.jsonl'
    write_samples(rendered_in(stood, rows, 'official', 8_192), file)
    lines = [json.loads(line) | dict(instruction=own) for line in file.read_text().splitlines()]
    file.write_text('\n'.join(map(json.dumps, lines)))
    monkeypatch.setenv('EHR_R1_HOME', str(tmp_path))
    with Proxy(chat(knows)) as proxy:
        assert main(['evaluate', f'bench={file}', f'model={proxy.url}', 'name=parrot']) == 0
    assert len(proxy.seen) == 3
    for words in proxy.asked():
        assert words.count(own) == 1
        assert words.partition(own)[2].startswith('\nChoose among')
    assert 'labevents' in capsys.readouterr().out
    assert {path.name for path in (tmp_path/'runs'/'bench.bench').iterdir()} == {'asked'}


# --- beside each other

def test_models_of_two_runs_meet_on_the_samples_that_both_answered(stood, run, p, tmp_path):
    other = Run('other', tmp_path)
    other.folder.mkdir(parents=True)
    for name in ('samples', 'trajectories'):
        (other.folder/name).symlink_to(stood.folder/name)
    with Proxy(chat(knows)) as proxy:
        build_general(run, p, at(proxy, per_task=1), 'hospital', 'open')
        build_general(other, p, at(proxy, per_task=3), 'hospital', 'open')
    joint = put_together([run, other])
    assert joint.models == ('parrot', 'other:parrot')
    assert set(joint.samples['sample_id']) == set(predictions(run, at(proxy))['sample_id'])
    scores, paired = score_joint(joint, 0, 50)
    values = scores.filter(system='parrot').drop('system')
    assert values.equals(scores.filter(system='other:parrot').drop('system'))
    assert len(paired) and (paired['difference'] == 0).all()
    assert costs([run, other])['system'].to_list() == ['parrot', 'parrot']


@pytest.mark.parametrize('text, said', [('', 'nothing to ask'), ('{"a": 1}', 'key instruction'), ('{"a', 'not JSON')])
def test_an_official_file_without_a_question_is_told(text, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('EHR_R1_HOME', str(tmp_path))
    (tmp_path/'bench.jsonl').write_text(text)
    assert main(['evaluate', f'bench={tmp_path}/bench.jsonl', 'model=http://127.0.0.1:9/v1', 'name=x']) != 0
    assert said in capsys.readouterr().err


def test_a_context_too_short_for_every_question_is_told(run, p):
    with pytest.raises(ValueError, match='nothing to ask: .* longer than context=50'):
        build_general(run, p, General('http://127.0.0.1:9/v1', 'x', tasks=TASKS, context=50), 'hospital', 'open')


# --- a model on this machine

def test_the_command_asks_a_model_here(stood, p, tmp_path, monkeypatch, capsys):
    tokenizer = train_tokenizer(['yes no Yes No a record of a patient']*50, 400)
    new_model('tiny', tokenizer, seed=0, context=4_096).save_pretrained(tmp_path/'some')
    tokenizer.save_pretrained(tmp_path/'some')
    monkeypatch.setenv('EHR_R1_HOME', str(stood.folder.parent.parent))
    words = ['evaluate', 'profile=smoke', 'run=stood', f'model={tmp_path/"some"}', 'tasks=ED_Hospitalization',
             'per_task=1', 'context=3000']
    assert main(words) == 0
    said = capsys.readouterr().out
    assert 'about' in said
    assert 'below .5' in said
    assert main(words) == 0
    assert 'evaluate: up to date' in capsys.readouterr().out


TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[doctor] "


def without_template(folder):
    "A checkpoint that nobody gave a chat format."
    tokenizer = train_tokenizer(['yes no Yes No a record of a patient']*50, 400)
    tokenizer.chat_template = None
    new_model('tiny', tokenizer, seed=0, context=4_096).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_checkpoint_without_a_template_is_asked_with_the_one_that_is_given(run, p, tmp_path):
    (tmp_path/'chat.jinja').write_text(TEMPLATE)
    asked = dict(model=without_template(tmp_path/'raw'), tasks='ED_Hospitalization', per_task=1, context=3_000)
    with pytest.raises(ModelError, match='no chat template'):
        build_general(run, p, General(**asked), 'hospital', 'open')
    g = General(template=str(tmp_path/'chat.jinja'), **asked)
    assert g.label == 'raw'
    assert build_general(run, p, g, 'hospital', 'open')
    tokenizer = prompter_of(templated(g, home_of(run, g))).tokenizer
    assert chat_text(tokenizer, [dict(role='user', content='Why?')], 'direct') == '[user] Why?\n[doctor] '
    assert not build_general(run, p, g, 'hospital', 'open')
    (tmp_path/'chat.jinja').write_text(TEMPLATE.replace('doctor', 'nurse'))
    assert build_general(run, p, g, 'hospital', 'open')


def test_training_begins_with_the_template_that_is_given_and_touches_no_weights(tmp_path):
    model, file = without_template(tmp_path/'raw'), tmp_path/'chat.jinja'
    file.write_text(TEMPLATE)
    run, p = Run('r', tmp_path), profile('smoke', model=model, template=str(file))
    assert build_base(run, p)
    assert not build_base(run, p)
    again, tokenizer = load_model(model_at(run, 'base'), device='cpu')
    assert tokenizer.chat_template == TEMPLATE
    assert (run.checkpoints/'base'/'model'/'model.safetensors').resolve() == tmp_path/'raw'/'model.safetensors'
    file.write_text(TEMPLATE.replace('doctor', 'nurse'))
    assert build_base(run, p)


@pytest.mark.parametrize('more, said', [
    (dict(model='kept', template='x.jinja'), 'has its own'),
    (dict(model='a/model', template='x.jinja'), 'no such file'),
])
def test_a_template_that_cannot_be_taken_is_told(more, said):
    with pytest.raises(ValueError, match=said):
        profile('smoke', **more)


def permuted(weights, heads):
    "Rows of a query or key matrix in the order in which GGUF keeps them."
    wide, hidden = weights.shape
    return weights.reshape(heads, 2, wide//heads//2, hidden).swapaxes(1, 2).reshape(wide, hidden)


def write_gguf(model, tokenizer, file):
    "A tiny Llama as the tools of its makers would pack it, in float32."
    gguf = pytest.importorskip('gguf')
    c, words = model.config, json.loads(tokenizer.backend_tokenizer.to_str())['model']
    out = gguf.GGUFWriter(file, 'llama')
    out.add_block_count(c.num_hidden_layers)
    out.add_context_length(c.max_position_embeddings)
    out.add_embedding_length(c.hidden_size)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_head_count(c.num_attention_heads)
    out.add_head_count_kv(c.num_key_value_heads)
    out.add_layer_norm_rms_eps(c.rms_norm_eps)
    out.add_rope_freq_base(c.rope_parameters['rope_theta'])
    out.add_vocab_size(c.vocab_size)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens)
    out.add_tokenizer_model('gpt2')
    out.add_token_list(tokens)
    out.add_token_types([3 if token in special else 1 for token in tokens])
    out.add_token_merges([merge if isinstance(merge, str) else ' '.join(merge) for merge in words['merges']])
    out.add_eos_token_id(tokenizer.eos_token_id)
    out.add_bos_token_id(tokenizer.eos_token_id)
    out.add_chat_template(tokenizer.chat_template)
    names = {'model.embed_tokens': 'token_embd', 'model.norm': 'output_norm', 'lm_head': 'output'}
    parts = {'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k', 'self_attn.v_proj': 'attn_v',
             'self_attn.o_proj': 'attn_output', 'mlp.gate_proj': 'ffn_gate', 'mlp.up_proj': 'ffn_up',
             'mlp.down_proj': 'ffn_down', 'input_layernorm': 'attn_norm', 'post_attention_layernorm': 'ffn_norm'}
    for layer in range(c.num_hidden_layers):
        names |= {f'model.layers.{layer}.{part}': f'blk.{layer}.{name}' for part, name in parts.items()}
    for name, weights in model.state_dict().items():
        stem, _, _ = name.rpartition('.')
        weights = weights.numpy()
        if stem.endswith(('q_proj', 'k_proj')):
            heads = c.num_attention_heads if stem.endswith('q_proj') else c.num_key_value_heads
            weights = permuted(weights, heads)
        out.add_tensor(names[stem] + '.weight', weights.copy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def test_a_gguf_file_holds_the_same_model(tmp_path):
    tokenizer = train_tokenizer(['yes no Yes No a record of a patient']*50, 400)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                         eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.eos_token_id)
    model = LlamaForCausalLM(config).eval()
    write_gguf(model, tokenizer, tmp_path/'tiny.gguf')
    again, words = load_model(tmp_path/'tiny.gguf', dtype='float32', device='cpu')
    ids = torch.arange(3, 40)[None]
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-4)
    assert words.chat_template == tokenizer.chat_template
    half, _ = load_model(tmp_path/'tiny.gguf', device='cpu')
    assert half.dtype == torch.bfloat16
    trained = get_peft_model(again, LoraConfig(r=2, target_modules=['q_proj'], init_lora_weights=False))
    trained.save_pretrained(tmp_path/'adapter')
    words.save_pretrained(tmp_path/'adapter')
    adapted, _ = load_model(tmp_path/'adapter', dtype='float32', device='cpu')  # the file is found again
    assert torch.equal(adapted.merge_and_unload()(ids).logits, trained.merge_and_unload()(ids).logits)


def test_a_file_that_is_no_gguf_is_one_line(tmp_path):
    (tmp_path/'x.gguf').write_bytes(b'not a model')
    with pytest.raises(ValueError) as error:
        load_model(tmp_path/'x.gguf')
    assert '\n' not in str(error.value)


def test_a_whole_setting_is_checked():
    check_general(General('m', tasks=TASKS, think=True, price='1,2'))


# --- other benchmarks

def test_another_benchmark_is_asked_in_its_own_words(run, p, tmp_path):
    question = {
        'Row Number': '1', 'Calculator ID': '6', 'Category': 'physical', 'Output Type': 'decimal',
        'Patient Note': 'Height 170 cm, weight 65 kg.', 'Question': 'What is the BMI?', 'Ground Truth Answer': '22.5',
        'Lower Limit': '21.4', 'Upper Limit': '23.6', 'Ground Truth Explanation': 'BMI = 65/1.7**2 = 22.5',
        'Calculator Name': 'Body Mass Index (BMI)', 'Note ID': '1', 'Note Type': 'Synthetic', 'Relevant Entities': '{}'}
    for name in ('train', 'test'):
        pl.DataFrame([question]).write_csv(tmp_path/f'{name}_data.csv')

    def calculates(asked):
        return '<think>65/2.89</think><answer>{"answer": "22.5"}</answer>', None

    with Proxy(chat(calculates)) as proxy:
        g = at(proxy)
        assert build_general_benchmark(run, p, MEDCALC, tmp_path, g)
        assert not build_general_benchmark(run, p, MEDCALC, tmp_path, g)
    [words] = proxy.asked()
    assert 'weight 65 kg' in words and 'What is the BMI?' in words
    results = pl.read_parquet(home_of(run, g)/'medcalc'/'results.parquet')
    own = results.filter(system='parrot', task='overall', metric='accuracy')
    assert own['value'].to_list() == [1.]


def shot_questions():
    "One that is asked, and answered ones of training patients: three yes, one no."
    rows = [dict(sample_id='asked', split='held_out', gold=['yes'], context=['Sodium 120 now. '*9])]
    for name, gold in (('a', 'yes'), ('b', 'yes'), ('c', 'yes'), ('d', 'no')):
        rows.append(dict(sample_id=name, split='train', gold=[gold], context=[f'Sodium of {name}. '*90]))
    about = dict(group='g', task='death', kind='risk', question='Will the patient die?')
    return pl.DataFrame([row | about for row in rows], QUESTIONS)


@pytest.mark.parametrize('k, context, shown', [(0, 4_000, 0), (1, 4_000, 2), (2, 4_000, 3), (2, 800, 2), (2, 400, 0)])
def test_as_many_answered_questions_as_fit_come_first(k, context, shown):
    questions = shot_questions()
    shots = answered_examples(questions, k, 42)
    prompter = ChatPrompter(context, 8, 'compact')
    ask, = questions_to_asks(questions.filter(split='held_out'), prompter, 'direct', shots)
    roles = [message['role'] for message in ask.prompt]
    assert roles == ['system', *['user', 'assistant']*shown, 'user']
    assert prompter.size(ask.prompt) <= context
    assert 'Sodium 120 now.' in ask.prompt[-1]['content']
    assert {message['content'] for message in ask.prompt[2::2]} <= {'yes', 'no'}
    assert all('120' not in message['content'] for message in ask.prompt[1:-1])
    if shown > 1:
        assert {message['content'] for message in ask.prompt[2:5:2]} == {'yes', 'no'}


def test_of_a_long_task_a_draw_is_asked_and_its_rate_is_kept(p, monkeypatch):
    monkeypatch.setattr('ehr_r1.transfer.question_sets._LONG_TASK', 200)
    about = dict(group='g', split='held_out', context=['x'], question='Why?')
    gold = [['yes'], ['yes'], ['yes'], ['no']]*250
    rows = [dict(sample_id=f'{i}', task='long', kind='risk', gold=gold[i]) | about for i in range(1_000)]
    rows += [dict(sample_id=f'd{i}', task='many', kind='decision', gold=['a']) | about for i in range(300)]
    asked = asked_questions(pl.DataFrame(rows, QUESTIONS), replace(p, other_per_task=0))
    assert dict(asked.group_by('task').len().rows()) == dict(long=200, many=300)
    assert .6 < (asked.filter(task='long')['gold'].list.first() == 'yes').mean() < .9


# --- for other tools

@pytest.fixture(scope='module')
def shared(stood, p):
    "EHR-Bench of the run as it is handed on."
    build_shared(stood, p, General(tasks=TASKS, context=4_000))
    return stood.folder/'shared'


@pytest.fixture
def functions(shared):
    "The functions that lm-evaluation-harness calls."
    spec = importlib.util.spec_from_file_location('functions', shared/'lm_eval'/'functions.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_shared_is_what_evaluate_asks(shared, run, p):
    with Proxy(chat(knows)) as proxy:
        build_general(run, p, at(proxy, context=4_000), 'hospital', 'open')
    rows = pl.concat([pl.read_parquet(file) for file in sorted((shared/'dataset'/'data').glob('*.parquet'))])
    assert sorted(rows['prompt']) == sorted(proxy.asked())
    assert set(rows['task']) == set(TASKS.split(','))


def test_the_card_names_every_file(shared):
    header = yaml.safe_load((shared/'dataset'/'README.md').read_text().split('---')[1])
    assert header['license'] == 'apache-2.0'
    for config in header['configs']:
        assert (shared/'dataset'/config['data_files'][0]['path']).is_file()


def test_a_card_of_credentialed_rows_says_that_they_stay(stood):
    rows = pl.DataFrame(dict(task=['labevents']))
    assert 'must not be uploaded' in card(stood, rows, 'credentialed')


def test_the_harness_scores_as_we_do(shared, functions):
    [doc, *_] = functions.load('labevents')['test']
    said = '\n'.join(f'- {name}' for name in doc['answer'][:1])
    assert functions.decision(doc, [said])['f1'] == set_f1(doc['answer'], doc['answer'][:1])
    assert functions.decision(doc, [said])['f1_strict'] == 0
    n = len(WAYS['yes'])
    assert functions.ways(doc) == [*WAYS['yes'], *WAYS['no']]
    sure, unsure = ([(math.log(share/2/n), False)]*n + [(math.log((1 - share)/2/n), False)]*n for share in (.9, .4))
    pairs = [functions.risk(dict(answer=['yes']), sure)['auroc'], functions.risk(dict(answer=['no']), unsure)['auroc']]
    assert functions.auroc(pairs) == 1.
    assert functions.risk(doc, sure)['yes_no_mass'] == pytest.approx(.5)
    for task in TASKS.split(','):
        told = (shared/'lm_eval'/f'ehr_bench_{task}.yaml').read_text()
        assert f'task: ehr_bench_{task}\n' in told
        assert 'description: "{{system}}"\n' in told  # else the model's own system message is taken
