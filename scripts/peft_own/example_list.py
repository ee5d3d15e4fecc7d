"""Which of PEFT's example scripts are run, with what in the place of the hub's models and data.

Each is run as it stands: by its own ``__main__``, in a process where ``import peft`` gives ``kilotune.peft``.
``models`` are names of the hub under which tiny random models lie (example_models.py), ``data`` those under which few
made-up rows do (example_standins.py); both are found by the script's own calls. ``beside`` says what else is not what
the script was written for. That transformers computes on the CPU, without the options that it no longer has, goes for
all.
"""

from __future__ import annotations

from typing import NamedTuple

CPU = "the accelerator that it takes is the CPU, whose memory is not counted"
HALF = "no fp16, which the CPU lacks"
SCORE = "`evaluate` is scikit-learn's function of that name"
HUB = "`push_to_hub` writes to a folder, from where the script loads it"
CELLS = "its code cells, without the lines that are commands of the notebook"
PICTURES = "`torchvision.transforms` is a few lines over Pillow"


class Step(NamedTuple):
    """A script and its arguments, as a shell has them."""

    path: str
    arguments: str = ""


class Example(NamedTuple):
    """What is run in one folder, and what must be there at the end.

    steps: scripts, one after the other. models: (name on the hub, kind in example_models.py). saved: patterns of
    folders of adapters that must have been written. also: other files that must be there. trains: whether parameters
    of an adapter must change.
    """

    steps: tuple[Step, ...]
    models: tuple[tuple[str, str], ...] = ()
    data: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    trains: bool = True

    @property
    def name(self) -> str:
        """The paths of its scripts, by which an example is called."""
        return " + ".join(dict.fromkeys(step.path for step in self.steps))


LLAMA = (("tiny/llama", "llama"),)
TRL = """--per_device_train_batch_size 2 --max_steps 4 --learning_rate 1e-3 --max_length 64 --report_to none
    --use_cpu True --bf16 False"""
ROWS = "--data_path meta-math/MetaMathQA --dataset_split train --dataset_field query response"
SEARCH = "feature_extraction/peft_lora_embedding_semantic_search.py"
SEARCH_ARGUMENTS = """--dataset_name smangrul/amazon_esci --model_name_or_path tiny/bert --output_dir out --use_peft
    --learning_rate 1e-3 --seed 1"""

EXAMPLES: tuple[Example, ...] = (
    Example(
        (
            Step(
                "olora_finetuning/olora_finetuning.py",
                """--base_model tiny/llama --output_dir out --batch_size 2 --val_set_size 4 --eval_step 4 --save_step 4
                --lora_r 4 --dtype float32 --seed 1""",
            ),
        ),
        models=LLAMA,
        data=("yahma/alpaca-cleaned",),
        saved=("out",),
    ),
    Example(
        (
            Step(
                "pissa_finetuning/preprocess.py",
                """--base_model_name_or_path tiny/llama --output_dir residual --bits fp32 --lora_r 4 --lora_alpha 4
                --init_lora_weights pissa""",
            ),
            Step(
                "pissa_finetuning/pissa_finetuning.py",
                f"""--residual_model_name_or_path residual --output_dir out --bits fp32 --convert_pissa_to_lora True
                --merge_and_save True {ROWS} {TRL}""",
            ),
        ),
        models=LLAMA,
        data=("meta-math/MetaMathQA",),
        saved=("out/pissa_lora",),
        also=("out/pissa_merged/model.safetensors",),
    ),
    Example(
        (Step("eva_finetuning/eva_finetuning.py"),),
        models=(("meta-llama/Llama-3.1-8B", "llama"),),
        data=("meta-math/MetaMathQA",),
        saved=("outputs/checkpoint-*",),
        beside=(CPU,),
    ),
    Example(
        (
            Step(
                "unilora_finetuning/unilora_finetuning.py",
                f"""--base_model_name_or_path tiny/llama --output_dir out --bits fp32 --unilora_r 4
                --merge_and_save True {ROWS} {TRL}""",
            ),
        ),
        models=LLAMA,
        data=("meta-math/MetaMathQA",),
        saved=("out/unilora_ft",),
        also=("out/unilora_merged/model.safetensors",),
    ),
    Example(
        (
            Step(
                "dora_finetuning/dora_finetuning.py",
                """--base_model tiny/llama --output_dir out --use_dora --quantize --lora_r 4 --cutoff_len 32
                --device cpu --hub_model_id tiny/out""",
            ),
        ),
        models=LLAMA,
        data=("timdettmers/openassistant-guanaco",),
        saved=("out",),
        beside=(HALF,),
    ),
    Example(
        (
            Step(
                "lorafa_finetune/lorafa_finetuning.py",
                """--base_model_name_or_path tiny/llama --output_dir out --lorafa --lora_rank 4 --cutoff_len 32
                --num_epochs 1 --quantize""",
            ),
        ),
        models=LLAMA,
        data=("meta-math/MetaMathQA-40K",),
        saved=("out",),
        beside=(HALF,),
    ),
    Example(
        (
            Step(
                SEARCH,
                f"""{SEARCH_ARGUMENTS} --num_train_epochs 2 --checkpointing_steps epoch --with_tracking
                --report_to tensorboard""",
            ),
            Step(SEARCH, f"{SEARCH_ARGUMENTS} --num_train_epochs 3 --resume_from_checkpoint out/epoch_1"),
        ),
        models=(("tiny/bert", "bert"),),
        data=("smangrul/amazon_esci",),
        saved=("out",),
        beside=(SCORE,),
    ),
    Example(
        (Step("conditional_generation/peft_lora_seq2seq_accelerate_fsdp.py"),),
        models=(("t5-base", "t5"),),
        data=("json",),
        saved=("t5-base_*",),
    ),
    Example(
        (Step("causal_language_modeling/peft_lora_clm_accelerate_ds_zero3_offload.py"),),
        models=(("bigscience/bloomz-7b1", "bloom"),),
        data=("parquet",),
        saved=("twitter_complaints_*",),
        beside=(CPU,),
    ),
    Example(
        (
            Step(
                "sft/train.py",
                f"""--model_name_or_path tiny/llama --output_dir out --use_peft_lora True --lora_r 4
                --lora_target_modules all-linear --splits train,test --chat_template_format chatml
                --dataset_name tiny/chats --dataset_text_field content --gradient_checkpointing True
                --use_reentrant False --eval_strategy epoch {TRL}""",
            ),
        ),
        models=LLAMA,
        data=("tiny/chats",),
        saved=("out",),
    ),
    Example(
        (
            Step(
                "lora_dreambooth/train_dreambooth.py",
                """--pretrained_model_name_or_path tiny/sd --tokenizer_name tiny/bert --max_train_steps 3
                --learning_rate 1e-3 --output_dir out --instance_data_dir pictures --instance_prompt picture
                --resolution 32 --train_batch_size 2 --report_to tensorboard --train_text_encoder --use_lora --lora_r 4
                --lora_text_encoder_r 4""",
            ),
            Step(
                "lora_dreambooth/convert_peft_sd_lora_to_kohya_ss.py",
                "--sd_checkpoint tiny/sd --peft_lora_path out --dump_path kohya.safetensors",
            ),
        ),
        models=(("tiny/sd", "pipeline"), ("tiny/bert", "bert")),
        saved=("out/unet", "out/text_encoder"),
        also=("kohya.safetensors",),
        beside=(CPU, PICTURES),
    ),
    Example(
        (
            Step(
                "ephemeral_gpu_offloading/load_with_dora.py",
                "--model tiny/llama --dora tiny/dora --merge_model_path merged",
            ),
        ),
        models=(*LLAMA, ("tiny/dora", "dora")),
        also=("merged/model.safetensors",),
        trains=False,
    ),
    Example(
        (Step("sequence_classification/VeRA.ipynb"),),
        models=(("roberta-base", "roberta"),),
        data=("glue",),
        beside=(CPU, SCORE, HUB, CELLS),
    ),
    Example(
        (Step("conditional_generation/peft_ia3_seq2seq.ipynb"),),
        models=(("bigscience/mt0-large", "mt5"),),
        data=("zeroshot/twitter-financial-news-sentiment",),
        saved=("bigscience/mt0-large_*",),
        beside=(CPU, CELLS),
    ),
    Example(
        (Step("multilayer_perceptron/multilayer_perceptron_lora.ipynb"),),
        beside=(CPU, HUB, CELLS),
    ),
    Example(
        (Step("int8_training/Finetune_opt_bnb_peft.ipynb"),),
        models=(("facebook/opt-6.7b", "opt"),),
        data=("Abirate/english_quotes",),
        beside=(CPU, HALF, HUB, CELLS),
    ),
)
