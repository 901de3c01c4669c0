"""Names of shipped configurations of version 0.1, and what says the same now.

Configs and options (`NAME=VALUE`) joined by `+`, as `config_words` reads them.
"""

MOVED_CONFIGS = {
    "ae/adversarial": "data/fashion_mnist+recipe/adversarial",
    "ae/adversarial_conditional": (
        "data/fashion_mnist+recipe/adversarial+model.classes=10+model.coder.widths=[512,256,18]"
    ),
    "ae/bernoulli": (
        "data/fashion_mnist+recipe/autoencoder+model.coder.widths=[256,64]"
        "+model.coder.code_activation=sigmoid+model.coder.likelihood=bernoulli"
        "+data.mean=[0.0]+data.std=[1.0]"
    ),
    "ae/beta_variational": "data/fashion_mnist+recipe/variational+model.beta=4.0",
    "ae/categorical": (
        "data/fashion_mnist+recipe/autoencoder+model.coder.widths=[256,64]"
        "+model.coder.likelihood=categorical+model.coder.levels=16+data.mean=[0.0]"
        "+data.std=[1.0]"
    ),
    "ae/compression": "data/photographs+recipe/compression",
    "ae/compression_residual": "data/photographs+recipe/compression_residual",
    "ae/contractive": "data/fashion_mnist+recipe/contractive",
    "ae/convolutional": "data/fashion_mnist+recipe/convolutional",
    "ae/deep": (
        "data/fashion_mnist+recipe/autoencoder+model.coder.widths=[512,128,32]"
        "+model.coder.code_activation=none"
    ),
    "ae/denoising": "data/fashion_mnist+recipe/denoising",
    "ae/denoising_convolutional": (
        "data/fashion_mnist+recipe/denoising+model.coder=Convolutional"
        "+model.coder.stages=[32,16]+model.coder.code_activation=none"
        "+model.coder.likelihood=bernoulli+model.corruption=gaussian"
    ),
    "ae/ecg": "data/ecg+recipe/ecg",
    "ae/generative_stochastic": "data/fashion_mnist+recipe/generative_stochastic",
    "ae/helmholtz": "data/fashion_mnist+recipe/helmholtz",
    "ae/importance_weighted": (
        "data/fashion_mnist+recipe/variational+model.draws=5+model.importance_weighted=true"
    ),
    "ae/k_sparse": (
        "data/fashion_mnist+recipe/sparse+model.coder.activation=none+model.penalty=k"
        "+model.weight=1.0e-3+model.active=32+optim.base_lr=4.0e-3+optim.weight_decay=0.0"
    ),
    "ae/linear": (
        "data/fashion_mnist+recipe/autoencoder+model.coder.widths=[32]+model.coder.activation=none"
    ),
    "ae/overcomplete": (
        "data/fashion_mnist+recipe/autoencoder+model.coder.widths=[1568]+optim.base_lr=2.0e-3"
    ),
    "ae/predictive_sparse": "data/fashion_mnist+recipe/predictive_sparse",
    "ae/recirculation": "data/fashion_mnist+recipe/recirculation",
    "ae/semantic_hashing": "data/fashion_mnist+recipe/semantic_hashing",
    "ae/sparse_kl": (
        "data/fashion_mnist+recipe/sparse+model.coder.activation=none"
        "+model.coder.code_activation=sigmoid+model.penalty=kl+model.weight=1.0e-3"
        "+optim.base_lr=4.0e-3+optim.weight_decay=0.0"
    ),
    "ae/sparse_l1": "data/fashion_mnist+recipe/sparse",
    "ae/stacked": "data/fashion_mnist+recipe/stacked",
    "ae/stacked_denoising": (
        "data/fashion_mnist+recipe/stacked+model.layer=Denoising"
        "+model.layer.corruption=masking+model.layer.amount=0.25+model.likelihood=bernoulli"
        "+model.code_likelihood=bernoulli+data.mean=[0.0]+data.std=[1.0]"
    ),
    "ae/tied": (
        "data/fashion_mnist+recipe/autoencoder+model.coder.widths=[256,64]"
        "+model.coder.activation=tanh+model.coder.tied=true"
    ),
    "ae/undercomplete": "data/fashion_mnist+recipe/autoencoder",
    "ae/variational": "data/fashion_mnist+recipe/variational",
    "eval/attentive_fashion_mnist": "eval/finetune_small_attentive",
    "eval/attentive_probe": "eval/finetune_attentive_probe",
    "eval/few_labels": "eval/finetune_few_labels",
    "eval/finetune_fashion_mnist": "data/fashion_mnist+eval/finetune_small",
    "eval/finetune_vit_base": "data/imagenet+eval/finetune_vit",
    "eval/finetune_vit_huge": "data/imagenet+eval/finetune_vit+drop_path=0.2+trainer.max_epochs=50",
    "eval/finetune_vit_large": "data/imagenet+eval/finetune_vit+trainer.max_epochs=50",
    "eval/from_scratch": "scratch=true+optim.layer_decay=1.0",
    "eval/knn_fashion_mnist": "data/fashion_mnist+baselines=true",
    "eval/knn_imagenet": "data/imagenet+eval/knn_vit",
    "eval/linear_probe": "data/imagenet+eval/finetune_linear_probe",
    "eval/official_base": "eval/finetune_vit_official",
    "eval/official_huge": (
        "eval/finetune_vit_official+optim.base_lr=1.0e-3+optim.layer_decay=0.75+drop_path=0.3"
    ),
    "eval/official_large": (
        "eval/finetune_vit_official+optim.base_lr=1.0e-3+optim.layer_decay=0.75+drop_path=0.2"
    ),
    "eval/partial": "trained_blocks=4+trainer.max_epochs=100",
    "eval/partial_fashion_mnist": "trained_blocks=1+trainer.max_epochs=2",
    "eval/probe_fashion_mnist": "data/fashion_mnist+baselines=true",
    "eval/probe_few_labels": "labels_per_class=5+seeds=5",
    "eval/probe_imagenet": "data/imagenet+eval/probe_vit",
    "eval/scratch_vit_base": "eval/finetune_vit_scratch",
    "eval/scratch_vit_huge": "eval/finetune_vit_scratch+drop_path=0.2+trainer.max_epochs=200",
    "eval/scratch_vit_large": "eval/finetune_vit_scratch+drop_path=0.2+trainer.max_epochs=200",
    "mae/compiled": "compile=true",
    "mae/cross": "overlay/cross",
    "mae/digits": "data/digits+recipe/mae_digits",
    "mae/epochs_1600": "trainer.max_epochs=1600",
    "mae/fashion_mnist": "data/fashion_mnist+recipe/mae_small",
    "mae/fashion_mnist_quick": "data/fashion_mnist+recipe/mae_small+overlay/quick",
    "mae/fast": "overlay/fast",
    "mae/lean_memory": "model.activation_checkpointing=true",
    "mae/low_resolution": "data.low_resolution.image_size=128+data.low_resolution.epochs=600",
    "mae/mask_tokens_in_encoder": "model.mask_tokens_in_encoder=true",
    "mae/several_masks": "model.masks_per_image=2+optim.warmup_epochs=20+trainer.max_epochs=400",
    "mae/small_decoder": "overlay/small_decoder",
    "mae/vit_base": "data/imagenet+recipe/mae_vit",
    "mae/vit_huge": "data/imagenet+recipe/mae_vit+model.encoder=vit_huge_patch14_224",
    "mae/vit_large": "data/imagenet+recipe/mae_vit+model.encoder=vit_large_patch16_224",
    "strategy/ddp": "trainer.strategy=ddp",
    "strategy/fsdp2": "overlay/fsdp2",
    "strategy/zero1": "overlay/zero1",
    "strategy/zero2": "overlay/zero2",
    "strategy/zero3": "overlay/zero3",
    "strategy/zero3_offload": "overlay/zero3+trainer.strategy.init_args.offload=true",
    "text/mae_bytes": (
        "data/text+recipe/masked_bytes+model.depth=2+model.decoder_depth=1"
        "+model.mask_tokens_in_encoder=false"
    ),
    "text/masked_bytes": "data/text+recipe/masked_bytes",
}
