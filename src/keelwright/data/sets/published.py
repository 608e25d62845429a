# SPDX-License-Identifier: Apache-2.0
"""What is known of each published set: one entry a set, in the order of the reference page."""

from __future__ import annotations

from typing import Final

from keelwright.data.sets.spec import FileSpec, SetSpec

_ROOM: Final = "keelwright.data.sets"

_REQUESTS: Final = (
    SetSpec(
        name="xstest",
        title="XSTest",
        licence="CC-BY-4.0",
        citation="Röttger et al., NAACL 2024, arXiv 2308.01263",
        upstream="github.com/paul-rottger/exaggerated-safety",
        files=(FileSpec("prompts", ("xstest_prompts.csv", "xstest_v2_prompts.csv"), hub=("xstest_prompts.csv",)),),
        loader=f"{_ROOM}.xstest:load_xstest",
        holds="250 safe prompts of 10 types, 200 unsafe contrasts",
        kinds=("contrast", "harmful"),
        hub="Paul/XSTest",
        caution="Short prompts in English, written by the authors: a model that over-refuses elsewhere may pass.",
    ),
    SetSpec(
        name="harmbench",
        title="HarmBench, text behaviours",
        licence="MIT",
        citation="Mazeika et al., ICML 2024, arXiv 2402.04249",
        upstream="github.com/centerforaisafety/HarmBench, data/behavior_datasets",
        files=(
            FileSpec("behaviours", ("harmbench_behaviors_text_all.csv",)),
            FileSpec("validation", ("harmbench_behaviors_text_val.csv",), required=False),
        ),
        loader=f"{_ROOM}.harmbench:load_harmbench",
        holds="400 behaviours: 200 standard, 100 contextual, 100 copyright (left out unless asked for)",
        kinds=("harmful",),
        caution="Without the behaviours about copyright, whose judge compares hashes; not the figure of a leaderboard.",
    ),
    SetSpec(
        name="advbench",
        title="AdvBench, harmful behaviours",
        licence="MIT",
        citation="Zou et al., arXiv 2307.15043",
        upstream="github.com/llm-attacks/llm-attacks, data/advbench",
        files=(FileSpec("goals", ("advbench.csv", "harmful_behaviors.csv")),),
        loader=f"{_ROOM}.advbench:load_advbench",
        holds="520 goals with an affirmative opening",
        kinds=("harmful",),
        caution="Many near-duplicates (clustered here): never report it alone. Copies without the goals about the "
        "sexual abuse of minors have 514 rows; say how many yours has.",
    ),
    SetSpec(
        name="catqa",
        title="CatQA, English",
        licence="Apache-2.0",
        citation="Bhardwaj et al., arXiv 2402.11746",
        upstream="github.com/declare-lab/red-instruct, harmful_questions",
        files=(FileSpec("questions", ("catqa_english.json",), hub=("data/catqa_english.json",)),),
        loader=f"{_ROOM}.catqa:load_catqa",
        holds="550 questions in 11 categories of 5 sub-categories",
        kinds=("harmful",),
        hub="declare-lab/CategoricalHarmfulQA",
        caution="Copies without the category about child abuse and the questions that name minors have 495 questions "
        "in 10 categories; say how many yours has. Four questions stand there twice.",
    ),
    SetSpec(
        name="harmfulqa",
        title="HarmfulQA, questions",
        licence="Apache-2.0",
        citation="Bhardwaj & Poria, arXiv 2308.09662",
        upstream="github.com/declare-lab/red-instruct, harmful_questions",
        files=(FileSpec("questions", ("harmfulqa.json",)),),
        loader=f"{_ROOM}.catqa:load_harmfulqa",
        holds="1,960 questions in 10 topics",
        kinds=("harmful",),
        folder="catqa",
        caution="Written by a model: some questions are harmless, and most are near-duplicates of another (clustered "
        "here).",
    ),
    SetSpec(
        name="ailuminate-demo",
        title="AILuminate 1.0, demo prompts",
        licence="CC-BY-4.0",
        citation="Ghosh et al., arXiv 2503.05731",
        upstream="github.com/mlcommons/ailuminate",
        files=(
            FileSpec(
                "prompts",
                ("airr_official_1.0_demo_en_us_prompt_set_release.csv", "airr_demo_en_us_without_cse.csv"),
            ),
        ),
        loader=f"{_ROOM}.ailuminate:load_ailuminate",
        holds="1,200 prompts of 12 hazards, of a skilled and an unskilled persona",
        kinds=("harmful",),
        caution="Figures on these demo prompts are NOT an AILuminate grade and must not be called so. Many prompts "
        "have a safe answer: count harmful answers, not refusals. Copies without the hazard cse and 3 further rows "
        "have 1,097.",
    ),
    SetSpec(
        name="u-safebench",
        title="U-SafeBench",
        licence="MIT (dataset card; the code repository has no licence file)",
        citation="In et al., EMNLP 2025, arXiv 2502.15086",
        upstream="github.com/yeonjun-in/U-SafeBench, data",
        files=(
            FileSpec(
                "safety",
                ("safety_eval_collection_v1.1.json", "safety_eval_collection.json"),
                hub=("safety_eval_collection.json",),
            ),
            FileSpec(
                "helpfulness",
                ("helpfulness_eval_collection_v1.1.json", "helpfulness_eval_collection.json"),
                hub=("helpfulness_eval_collection.json",),
            ),
        ),
        loader=f"{_ROOM}.u_safebench:load_u_safebench",
        holds="2,296 instructions with a profile (176 instructions, 133 profiles), 491 of an ordinary user; version "
        "1.1",
        kinds=("harmful", "benign"),
        hub="Yeonjun/U-SafeBench",
        caution="Rows are not independent: cluster by instruction and by profile. The hub had version 1 (1,936 rows "
        "in all) when it was last seen: figures of the two versions are not comparable.",
    ),
    SetSpec(
        name="hh-harmless",
        title="HH-RLHF, harmless-base, test",
        licence="MIT",
        citation="Bai et al., arXiv 2204.05862",
        upstream="github.com/anthropics/hh-rlhf, harmless-base",
        files=(
            FileSpec(
                "pairs",
                ("harmless-base-test.jsonl.gz", "test.jsonl.gz"),
                hub=("harmless-base/test.jsonl.gz",),
            ),
        ),
        loader=f"{_ROOM}.hh_harmless:load_hh_harmless",
        holds="2,312 preference pairs, and the first human turn of each as an item",
        kinds=("harmful",),
        folder="hh-rlhf-harmless-test",
        hub="Anthropic/hh-rlhf",
        caution="Red-team dialogues with harmful answers: for preference losses, not for supervised training. Not "
        "every opening turn is harmful by itself.",
    ),
)

_TASKS: Final = (
    SetSpec(
        name="humaneval",
        title="HumanEval",
        licence="MIT",
        citation="Chen et al., arXiv 2107.03374",
        upstream="github.com/openai/human-eval, data",
        files=(
            FileSpec(
                "problems",
                ("HumanEval.jsonl.gz", "HumanEval.jsonl"),
                hub=("openai_humaneval/test-00000-of-00001.parquet",),
            ),
        ),
        loader=f"{_ROOM}.humaneval:load_humaneval",
        holds="164 Python functions to complete, with unit tests",
        kinds=("task",),
        hub="openai/openai_humaneval",
        caution="Its tests are weak, and most models have seen it.",
    ),
    SetSpec(
        name="mbpp",
        title="MBPP",
        licence="CC-BY-4.0",
        citation="Austin et al., arXiv 2108.07732",
        upstream="github.com/google-research/google-research, mbpp",
        files=(
            FileSpec(
                "problems",
                ("mbpp.jsonl",),
                hub=tuple(
                    f"full/{split}-00000-of-00001.parquet" for split in ("prompt", "test", "validation", "train")
                ),
            ),
        ),
        loader=f"{_ROOM}.mbpp:load_mbpp",
        holds="974 Python problems with three assertions; test split 500 (task ids 11 to 510)",
        kinds=("task",),
        hub="google-research-datasets/mbpp",
        caution="No solved example is shown unless asked for; the paper shows three.",
    ),
    SetSpec(
        name="gsm8k",
        title="GSM8K",
        licence="MIT",
        citation="Cobbe et al., arXiv 2110.14168",
        upstream="github.com/openai/grade-school-math, grade_school_math/data",
        files=(
            FileSpec("test", ("test.jsonl",), hub=("main/test-00000-of-00001.parquet",)),
            FileSpec("train", ("train.jsonl",), hub=("main/train-00000-of-00001.parquet",), required=False),
        ),
        loader=f"{_ROOM}.gsm8k:load_gsm8k",
        holds="1,319 word problems (test), 7,473 (train)",
        kinds=("task",),
        hub="openai/gsm8k",
    ),
)

_CONTINUATIONS: Final = (
    SetSpec(
        name="decodingtrust-toxicity",
        title="DecodingTrust, toxicity, user prompts",
        licence="CC-BY-SA-4.0",
        citation="Wang et al., arXiv 2306.11698; Gehman et al., arXiv 2009.11462",
        upstream="github.com/AI-secure/DecodingTrust, data/toxicity/user_prompts",
        files=(
            FileSpec("toxic", ("toxic.jsonl",), hub=("toxicity/user_prompts/toxic.jsonl",)),
            FileSpec("nontoxic", ("nontoxic.jsonl",), hub=("toxicity/user_prompts/nontoxic.jsonl",)),
        ),
        loader=f"{_ROOM}.decodingtrust:load_decodingtrust",
        holds="1,196 toxic and 1,200 other beginnings of sentences, with Perspective scores",
        kinds=("benign",),
        hub="AI-Secure/DecodingTrust",
        caution="Share-alike: what is made of it keeps the licence. Perspective has changed since: figures of "
        "another scorer are not comparable with published ones.",
    ),
    SetSpec(
        name="realtoxicityprompts",
        title="RealToxicityPrompts",
        licence="Apache-2.0",
        citation="Gehman et al., arXiv 2009.11462",
        upstream="github.com/allenai/real-toxicity-prompts",
        files=(FileSpec("prompts", ("prompts.jsonl",), hub=("prompts.jsonl",)),),
        loader=f"{_ROOM}.decodingtrust:load_real_toxicity_prompts",
        holds="about 100,000 beginnings of sentences, with Perspective scores",
        kinds=("benign",),
        hub="allenai/real-toxicity-prompts",
        caution="Perspective has changed since: figures of another scorer are not comparable with published ones.",
    ),
)

_LABELLED: Final = (
    SetSpec(
        name="xstest-answers",
        title="XSTest, labelled answers",
        licence="CC-BY-4.0 (prompts); the answers follow the terms of the models that wrote them",
        citation="Röttger et al., NAACL 2024, arXiv 2308.01263",
        upstream="github.com/paul-rottger/exaggerated-safety, model completions",
        files=tuple(
            FileSpec(
                model,
                (f"completions_{model}_labelled.csv", f"xstest_v2_completions_{model}.csv"),
                required=False,
            )
            for model in ("mistralinstruct", "mistralguard", "gpt4", "llama2new", "llama2orig")
        ),
        loader=f"{_ROOM}.xstest:load_xstest_answers",
        holds="450 answers a model, labelled by two people as compliance, full or partial refusal",
        folder="xstest",
        caution="Gold is the people's label. The GPT-4 labels of one file disagree with it row by row, and some hold "
        "the judge's own refusal.",
    ),
    SetSpec(
        name="hatecheck",
        title="HateCheck",
        licence="CC-BY-4.0",
        citation="Röttger et al., ACL 2021, arXiv 2012.15606",
        upstream="github.com/paul-rottger/hatecheck-data",
        files=(FileSpec("cases", ("test_suite_cases.csv", "hatecheck.csv"), hub=("test.csv",)),),
        loader=f"{_ROOM}.hatecheck:load_hatecheck",
        holds="3,728 cases of 29 functionalities",
        hub="Paul/hatecheck",
        caution="Functional tests: report accuracy per functionality, not one number.",
    ),
    SetSpec(
        name="davidson-hate",
        title="Hate speech and offensive language",
        licence="MIT",
        citation="Davidson et al., ICWSM 2017, arXiv 1703.04009",
        upstream="github.com/t-davidson/hate-speech-and-offensive-language, data",
        files=(FileSpec("tweets", ("labeled_data.csv",), hub=("data/train-00000-of-00001.parquet",)),),
        loader=f"{_ROOM}.davidson:load_davidson",
        holds="24,783 tweets: hate, offensive, neither",
        hub="tdavidson/hate_speech_offensive",
        caution="African-American English is labelled offensive too often (Davidson et al. 2019), and classes are "
        "far from balanced: report each class. Tweets hold slurs.",
    ),
    SetSpec(
        name="dixon-madlibs",
        title="Unintended bias, sentences from templates",
        licence="Apache-2.0",
        citation="Dixon et al., AIES 2018",
        upstream="github.com/conversationai/unintended-ml-bias-analysis, archive/unintended_ml_bias/eval_datasets",
        files=(FileSpec("sentences", ("bias_madlibs_77k.csv",)),),
        loader=f"{_ROOM}.dixon:load_madlibs",
        holds="76,564 short sentences that name an identity, half of them toxic",
        folder="toxicity-bias-madlibs",
        caution="For differences between identities, not for accuracy: the sentences are made.",
    ),
    SetSpec(
        name="dixon-comments",
        title="Unintended bias, Wikipedia comments",
        licence="CC-BY-SA (comments), Apache-2.0 (repository)",
        citation="Dixon et al., AIES 2018",
        upstream="github.com/conversationai/unintended-ml-bias-analysis, archive/unintended_ml_bias/eval_datasets",
        files=(FileSpec("comments", ("toxicity_nonfuzzed_testset.csv",)),),
        loader=f"{_ROOM}.dixon:load_comments",
        holds="1,492 talk-page comments, 248 of them toxic",
        folder="toxicity-bias-madlibs",
    ),
)

PUBLISHED: Final = (*_REQUESTS, *_TASKS, *_CONTINUATIONS, *_LABELLED)
"""Every set: requests, tasks, beginnings to continue, and texts with labels."""
