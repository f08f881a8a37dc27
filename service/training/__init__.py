"""How the embedded checkpoint is made: corpus, tokenizer, training, evaluation and model card.

    corpus     fetch, clean, label and split the rated texts
    explain    tone words and the explanation each text is trained with
    tokenizer  the byte-level BPE
    augment    variations of train texts and texts made from the rated lexicon
    samples    token sequences with loss weights, and the batches of one epoch
    model      the small GPT-J and its fast training forward
    loop       one training run: steps, validation, checkpoints, resume
    export     FP16 package data from a finished run
    train      the command that runs all of the above
    scoring    the label decision and generation of the finished checkpoint
    baselines  VADER and TF-IDF logistic regression on the same rows
    evaluate   the command that measures and writes evaluation.json
    card       MODEL_CARD.md from evaluation.json

Only this package needs scikit-learn and vaderSentiment; the service never imports it.
"""
