"""The trainer pushes: every strategy, adapters included; last-checkpoint is gone on from; failures are told."""

from __future__ import annotations

import pytest
from hub_client import INPUT_IDS, LOGITS, ClientError, client, hub  # noqa: F401
from hub_server import card_errors

SETUP = LOGITS + (
    """
from conftest import BACKBONES, make_datasets, make_tasks, make_tokenizer
from hf_multitask import AdapterModel, AutoModelForMultiTask, MultiTaskTrainer, MultiTaskTrainingArguments

def make_trainer(folder, backbone=None, callbacks=(), **arguments):
    torch.manual_seed(0)
    model = AdapterModel.from_backbone(backbone or BACKBONES["bert"](), make_tasks(), shared_rank=2)
    defaults = dict(
        max_steps=4, save_steps=2, eval_strategy="steps", eval_steps=4, logging_steps=2, learning_rate=1e-2,
        per_device_train_batch_size=4, report_to="none", disable_tqdm=True, use_cpu=True, seed=7,
        push_to_hub=True, hub_always_push=True,
    )
    return MultiTaskTrainer(
        model=model,
        args=MultiTaskTrainingArguments(folder, **{**defaults, **arguments}),
        train_dataset=make_datasets(rows=16),
        eval_dataset=make_datasets(1, rows=8),
        processing_class=make_tokenizer(),
        callbacks=list(callbacks),
    )
"""
)
TRAIN = SETUP + (
    """
trainer = make_trainer(folder, **arguments)
trainer.train()
if push_at_end:
    trainer.push_to_hub(tags=["demo"], license="mit", language="en")
result = logits_of(trainer.model)
"""
)
LOAD = (
    "from hf_multitask import AutoModelForMultiTask\n"
    + LOGITS
    + "result = logits_of(AutoModelForMultiTask.from_pretrained(repo))"
)
PARTS = ["shared_adapter", *(f"adapters/{name}" for name in ("tone", "strength", "traits", "names"))]
PROGRESS = ["Training in progress, step 2", "Training in progress, step 4"]


def train(client, tmp_path, push_at_end=False, **arguments):  # noqa: F811
    values = dict(folder=str(tmp_path / "out"), arguments=arguments, push_at_end=push_at_end, input_ids=INPUT_IDS)
    return client.run(TRAIN, **values)


def with_checkpoints(*names):
    return [
        message
        for message, name in zip(PROGRESS, names, strict=True)
        for message in ([message, f"{message}, checkpoint"] if name else [message])
    ]


STRATEGIES = {
    "end": ([], []),
    "every_save": (PROGRESS, []),
    "checkpoint": (with_checkpoints(True, True), ["last-checkpoint"]),
    "all_checkpoints": (with_checkpoints(True, True), ["checkpoint-2", "checkpoint-4"]),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.sample(2)
def test_every_strategy_pushes_the_whole_model(hub, client, tmp_path, strategy):  # noqa: F811
    messages, checkpoints = STRATEGIES[strategy]
    repo = f"me/run-{strategy}"
    logits = train(client, tmp_path, push_at_end=strategy == "end", hub_strategy=strategy, hub_model_id=repo)
    found = hub.repos[repo]
    assert found.messages["main"] == ["initial commit", *(messages or ["End of training"])]
    files = found.files()
    weights = {"model.safetensors", *(f"{part}/adapter_model.safetensors" for part in PARTS)}
    assert weights <= set(files)
    assert all(file.content for path, file in files.items() if path.endswith("adapter_config.json"))
    for checkpoint in checkpoints:
        kept = {*weights, "optimizer.pt", "trainer_state.json", "multitask_state.json"}
        assert {f"{checkpoint}/{name}" for name in kept} <= set(files)
    folders = {path.split("/")[0] for path in files if "/" in path}
    assert folders == {"adapters", "shared_adapter", *checkpoints}
    assert client.run(LOAD, repo=repo, input_ids=INPUT_IDS) == logits
    card = files["README.md"].content.decode()
    assert card_errors(card) == [] and "library_name: hf_multitask" in card and f'model="{repo}"' in card
    assert ("license: mit" in card and "- demo\n" in card) == (strategy == "end")
    assert str(tmp_path).encode() not in files["config.json"].content


def test_a_run_goes_on_from_the_last_checkpoint_on_the_hub(hub, client, tmp_path):  # noqa: F811
    stopped = SETUP + (
        """
from transformers import TrainerCallback
class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == 2
trainer = make_trainer(folder, callbacks=[Stop()], hub_strategy="checkpoint", hub_model_id="me/stopped")
trainer.train()
"""
    )
    client.run(stopped, folder=str(tmp_path / "first"), input_ids=INPUT_IDS)
    assert "last-checkpoint/adapters/tone/adapter_model.safetensors" in hub.repos["me/stopped"].files()
    resumed = SETUP + (
        """
from huggingface_hub import snapshot_download
copy = snapshot_download("me/stopped", local_dir=folder + "/copy", allow_patterns="last-checkpoint/*")
trainer = make_trainer(folder, push_to_hub=False)
trainer.train(resume_from_checkpoint=copy + "/last-checkpoint")
result = [trainer.state.global_step, logits_of(trainer.model)]
"""
    )
    steps, logits = client.run(resumed, folder=str(tmp_path / "second"), input_ids=INPUT_IDS)
    assert steps == 4 and logits == train(client, tmp_path, push_to_hub=False)


def test_the_code_goes_along_where_it_is_asked_for(hub, client, tmp_path):  # noqa: F811
    options = dict(hub_strategy="every_save", hub_model_id="me/run-code", hub_include_code=True)
    logits = train(client, tmp_path, **options)
    program = LOGITS + "result = logits_of(AutoModel.from_pretrained('me/run-code', trust_remote_code=True))"
    assert client.run(program, input_ids=INPUT_IDS, package=False) == logits
    assert "trust_remote_code=True" in hub.repos["me/run-code"].files()["README.md"].content.decode()


def test_a_backbone_of_this_machine_goes_along(hub, client, tmp_path):  # noqa: F811
    program = SETUP + (
        """
import hf_multitask.hub.trainer_push as pushing
said = []
pushing.logger.warning = said.append
BACKBONES["bert"]().save_pretrained(folder + "/backbone")
trainer = make_trainer(folder + "/out", folder + "/backbone", hub_strategy="every_save", hub_model_id="me/run-local")
trainer.train()
result = [said, logits_of(trainer.model)]
"""
    )
    said, logits = client.run(program, folder=str(tmp_path), input_ids=INPUT_IDS)
    assert len(said) == 1 and "it is saved and pushed with the model" in said[0]
    (tmp_path / "backbone").rename(tmp_path / "gone")
    assert client.run(LOAD, repo="me/run-local", input_ids=INPUT_IDS) == logits
    files = hub.repos["me/run-local"].files()
    assert not [path for path in files if path.endswith(".json") and str(tmp_path).encode() in files[path].content]


def test_a_push_in_the_background_that_fails_is_told_and_training_goes_on(hub, client, tmp_path):  # noqa: F811
    program = SETUP + (
        """
import hf_multitask.hub.trainer_push as pushing
said = []
pushing.logger.warning = said.append
trainer = make_trainer(folder, hub_strategy="every_save", hub_model_id="me/run-failing")
trainer.train()
result = [trainer.state.global_step, said]
"""
    )
    hub.break_commits = True
    try:
        steps, said = client.run(program, folder=str(tmp_path / "out"), input_ids=INPUT_IDS)
    finally:
        hub.break_commits = False
    assert steps == 4 and len(said) == 2
    assert all("a push in the background failed, training goes on: the connection to" in one for one in said)
    assert hub.repos["me/run-failing"].messages["main"] == ["initial commit"]


def test_a_refused_token_is_told_before_training(hub, client, tmp_path):  # noqa: F811
    values = dict(folder=str(tmp_path / "out"), arguments={"hub_model_id": "me/refused"}, push_at_end=False)
    for token, part in (("wrong", "does not accept the token for 'me/refused' .401"), ("other", "may not write to")):
        with pytest.raises(ClientError, match=f"PermissionError: .*{part}"):
            client.run(TRAIN, {"HF_TOKEN": token}, input_ids=INPUT_IDS, **values)
    assert "me/refused" not in hub.repos


def test_a_model_is_pushed_with_its_adapters_by_its_own_method(hub, client, tmp_path):  # noqa: F811
    program = SETUP + (
        """
model = AdapterModel.from_backbone(BACKBONES["bert"](), make_tasks(), shared_rank=2)
model.push_to_hub("me/by-method", commit_message="mine")
model.push_to_hub("me/by-method", revision="branch")
result = logits_of(model)
"""
    )
    logits = client.run(program, input_ids=INPUT_IDS)
    assert set(hub.repos["me/by-method"].branches) == {"main", "branch"}
    assert hub.repos["me/by-method"].messages == {"main": ["initial commit", "mine"]}
    assert {f"{part}/adapter_model.safetensors" for part in PARTS} <= set(hub.repos["me/by-method"].files())
    assert client.run(LOAD, repo="me/by-method", input_ids=INPUT_IDS) == logits
