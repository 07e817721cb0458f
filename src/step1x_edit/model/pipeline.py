"""`Step1XEditPipeline`: the whole edit in six numbered stages, in diffusers' conventions.

Picture and instruction go in, the edited picture comes out at the model's size. `Editor` puts it
back into the user's picture; people who know diffusers can call the pipeline itself.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils.outputs import BaseOutput
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from step1x_edit.errors import InvalidRequest
from step1x_edit.images import fit_size
from step1x_edit.model.config import own_sampling
from step1x_edit.model.guidance import (
    euler_sample,
    guided_velocity,
    is_guided,
    prepare_ids,
    schedule,
)
from step1x_edit.model.inputs import Row, broadcast, check_drawing, one_guidance, one_negative
from step1x_edit.model.instruction import (
    RELEASE_V1,
    InstructionConfig,
    InstructionEncoder,
    InstructionFeatures,
)
from step1x_edit.model.instruction_config import read_instruction
from step1x_edit.model.latents import (
    PIXELS_PER_TOKEN,
    decode_tokens,
    encode_pictures,
    in_float32,
    keep_reference,
    row_noise,
)
from step1x_edit.model.lora_loader import Step1XEditLoraLoaderMixin
from step1x_edit.model.processor import PictureProcessor
from step1x_edit.model.transformer import Step1XEditTransformer2DModel

OWN_CLASSES = {
    "transformer": ["step1x_edit.model.transformer", "Step1XEditTransformer2DModel"],
    "processor": ["transformers", "Qwen2_5_VLProcessor"],
}
"""Where to look for classes: the published library of the transformer has none of that name, and
diffusers cannot load a processor class that is not transformers' own (ours is passed in)."""

StepCallback = Callable[
    ["Step1XEditPipeline", int, float, dict[str, Tensor]], dict[str, Tensor] | None
]


@dataclass
class Step1XEditOutput(BaseOutput):
    """What a call gives back, in the order of the inputs, the results of one input together."""

    images: Any
    """PIL pictures, or an array or tensor, as `output_type` says."""
    references: Any = None
    """Each input as the autoencoder renders it, where it was asked for."""


class Step1XEditPipeline(DiffusionPipeline, Step1XEditLoraLoaderMixin):
    """Edits pictures by instruction, or draws them from a description.

    Args:
        processor: Tokenizer, picture preprocessing and chat template.
        scheduler: Kept for the folder layout; the time steps are those of `guidance.schedule`, its
            equal.
        text_encoder: The multimodal language model that reads picture and instruction.
        transformer: The diffusion transformer with its connector.
        vae: A diffusers autoencoder, 8× smaller.
        instruction: How this checkpoint wants its instructions; that of the v1 releases by default.
        num_inference_steps: Steps where a call names none.
        guidance_scale: Guidance where a call names none.
        size_level: Size level in pixels where a call names none.
        time_shift: Shift of the times towards noise; None: the releases' rule by picture size.
        keep_threshold: See `latents.keep_reference`; 0, as the releases have it, keeps nothing.
        draw_size: Side in pixels of a drawn picture where a call names none.
        draw_negative_prompt: What a drawn picture is led away from where a call names nothing.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        processor: PictureProcessor,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: Any,
        transformer: Step1XEditTransformer2DModel,
        vae: Any,
        instruction: InstructionConfig = RELEASE_V1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        size_level: int | None = None,
        draw_size: int | None = None,
        draw_negative_prompt: str | None = None,
        time_shift: float | None = None,
        keep_threshold: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_modules(
            processor=processor,
            scheduler=scheduler,
            text_encoder=text_encoder,
            transformer=transformer,
            vae=vae,
        )
        named = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "size_level": size_level,
            "draw_size": draw_size,
            "draw_negative_prompt": draw_negative_prompt,
        }
        self.register_to_config(
            **own_sampling(named), time_shift=time_shift, keep_threshold=keep_threshold
        )
        self.instruction = instruction
        self.image_processor = VaeImageProcessor(vae_scale_factor=PIXELS_PER_TOKEN)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> "Step1XEditPipeline":
        """Load a diffusers-layout folder or hub repository, published or ours.

        Args:
            pretrained_model_name_or_path: Folder, or name on the hub.
            kwargs: As of `DiffusionPipeline.from_pretrained`.

        Raises:
            CheckpointError: The release's prompt prefix has not been fetched.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            names = ("cache_dir", "revision", "token", "local_files_only")
            download = {name: kwargs[name] for name in names if name in kwargs}
            folder = Path(cls.download(pretrained_model_name_or_path, **download))
        kwargs.setdefault("instruction", read_instruction(folder).with_kept_prefix())
        kwargs["instruction"].require_prefix()  # before gigabytes are read
        if "processor" not in kwargs:
            kwargs["processor"] = PictureProcessor.from_pretrained(folder / "processor")
        return cast("Step1XEditPipeline", super().from_pretrained(folder, **kwargs))

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride] - the tuple forms are not used by pipelines
        """The ``model_index.json``, with our classes where other libraries have none that loads."""
        config = cast("dict[str, Any]", super().load_config(*args, **kwargs))
        return config | {name: OWN_CLASSES[name] for name in OWN_CLASSES if name in config}

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - same call
        """Write the diffusers-layout folder, ``instruction.json`` beside ``model_index.json``."""
        super().save_pretrained(save_directory, **kwargs)
        self.instruction.save(save_directory)

    @property
    def channels(self) -> int:
        """Values of a picture token."""
        return self.transformer.config["in_channels"]

    @property
    def instruction_encoder(self) -> InstructionEncoder:
        """The language model and how this checkpoint reads with it."""
        return InstructionEncoder(self.text_encoder, self.processor, self.instruction)

    @torch.no_grad()
    def encode_images(
        self, images: Sequence[Image.Image]
    ) -> Float[Tensor, "batch tokens channels"]:
        """Pictures of one size, sides multiples of 16 pixels, to their tokens, in float32."""
        pixels = self.image_processor.preprocess(cast("Any", list(images)))
        with in_float32(self.vae):
            return encode_pictures(self.vae, pixels.to(self._execution_device))

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | Sequence[Image.Image] | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        size_level: int | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Float[Tensor, "batch tokens channels"] | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        return_references: bool = False,
        callback_on_step_end: StepCallback | None = None,
    ) -> Step1XEditOutput | tuple[Any, ...]:
        """Edit `image` as `prompt` says; without `image`, draw `prompt`.

        Args:
            image: One picture or several; None draws from the text alone.
            prompt: One instruction for all pictures, or one each.
            negative_prompt: What guidance leads away from; None: nothing for an edit, the model's
                own for a drawn picture.
            num_inference_steps: Euler steps, at least 1; None: the model's own number.
            size_level: The model works on about `size_level`² pixels of the picture's shape; None:
                the model's own.
            guidance_scale: Strength of the instruction; -1 is none, at half the cost; None: the
                model's own.
            true_cfg_scale: Another name of `guidance_scale`.
            height: Height in pixels, a multiple of 16; without `image`, or to overrule the size
                rule.
            width: Width in pixels, likewise.
            num_images_per_prompt: Results for each input.
            generator: CPU generator of the noise, or one per result.
            latents: The noise itself, packed, one row per result, instead of `generator`.
            output_type: Form of the pictures; "latent" gives the packed tokens, a tensor each.
            return_dict: False gives a tuple.
            return_references: Also give each input as the autoencoder renders it (the measure of
                what changed).
            callback_on_step_end: Called with the pipeline, the step, the time and
                ``{"latents": …}``; may give back latents to go on with.

        Returns:
            The results, at the model's size.

        Raises:
            InvalidRequest: An argument is out of range or does not fit the others.
        """
        # 1. Check the request and fill in the model's own settings.
        own = self.config
        num_steps = (
            own["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        )
        guidance = one_guidance(guidance_scale, true_cfg_scale, own["guidance_scale"])
        if num_steps < 1 or num_images_per_prompt < 1:
            raise InvalidRequest(
                f"{num_steps} steps for {num_images_per_prompt} pictures: both must be at least 1"
            )
        negative = one_negative(
            negative_prompt, is_drawn=image is None, own=own["draw_negative_prompt"]
        )
        images, prompts, negatives = broadcast(image, prompt, negative)
        if image is None:
            check_drawing(self.transformer.version)

        # 2. One row per result: its picture at the model's size, and its noise.
        rows = []
        num_rows = len(images) * num_images_per_prompt
        for i, picture in enumerate(images):
            size = self._size_of(picture, height, width, size_level)
            small = picture and picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
            for _ in range(num_images_per_prompt):
                noise = row_noise(size, self.channels, len(rows), num_rows, generator, latents)
                rows.append(Row(small, prompts[i], negatives[i], size, noise))

        # 3. to 5. Rows of one size and kind go through the networks together.
        groups: dict[Any, list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            groups[row.size, row.image is None].append(i)
        made: dict[int, Tensor] = {}
        references: dict[int, Tensor] = {}
        for indices in groups.values():
            group = [rows[i] for i in indices]
            reference = self.encode_references(group)
            features = self.encode_instructions(group, is_guided(guidance))
            tokens = self.denoise(
                group, features, reference, num_steps, guidance, callback_on_step_end
            )
            made |= dict(zip(indices, tokens, strict=True))
            if reference is not None:
                references |= dict(zip(indices, reference, strict=True))

        # 6. Decode in float32.
        self.maybe_free_model_hooks()
        results = self.decode([made[i] for i in range(len(rows))], rows, output_type)
        rendered = None
        if return_references and references:
            every = range(0, len(rows), num_images_per_prompt)  # one for each input
            inputs = self.decode(
                [references[i] for i in every], [rows[i] for i in every], output_type
            )
            places = [i // num_images_per_prompt for i in range(len(rows))]
            together = isinstance(inputs, Tensor)
            rendered = inputs[places] if together else [inputs[place] for place in places]
        return Step1XEditOutput(results, rendered) if return_dict else (results, rendered)

    def _size_of(
        self, image: Image.Image | None, height: int | None, width: int | None, level: int | None
    ) -> tuple[int, int]:
        """Width and height of a result in pixels."""
        own = self.config["draw_size" if image is None else "size_level"]
        side = own if level is None else level
        size = fit_size(*image.size, side) if image is not None else (side, side)
        size = (size[0] if width is None else width, size[1] if height is None else height)
        if any(side < PIXELS_PER_TOKEN or side % PIXELS_PER_TOKEN for side in size):
            raise InvalidRequest(
                f"width and height {size[0]} × {size[1]}: each must be a multiple of "
                f"{PIXELS_PER_TOKEN} pixels"
            )
        return size

    def encode_references(self, rows: list[Row]) -> Float[Tensor, "batch tokens channels"] | None:
        """3. Source pictures → reference tokens; None for text to image."""
        if rows[0].image is None:
            return None
        # Several results of one input share its picture, which is then encoded once.
        distinct = {id(row.image): row.image for row in rows}
        tokens = self.encode_images(cast("Any", list(distinct.values())))
        places = {name: place for place, name in enumerate(distinct)}
        return tokens[[places[id(row.image)] for row in rows]]

    def encode_instructions(self, rows: list[Row], guided: bool) -> InstructionFeatures:
        """4. Pictures and instructions → features; the negative rows follow the positive ones."""
        encoder = self.instruction_encoder
        images = [row.image for row in rows]
        prompts = [row.prompt for row in rows]
        if guided:
            images, prompts = images * 2, prompts + [row.negative_prompt for row in rows]
        return encoder.encode(encoder.tokenize(images, prompts))

    def denoise(
        self,
        rows: list[Row],
        features: InstructionFeatures,
        reference: Tensor | None,
        num_steps: int,
        guidance: float,
        callback: StepCallback | None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """5. Noise → tokens of the result, step by step."""
        device, dtype = self._execution_device, self.transformer.dtype
        noise = torch.cat([row.noise for row in rows]).to(device)
        width, height = rows[0].size
        grid = (height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)
        img_ids, txt_ids = prepare_ids(
            features.features.shape[1],
            grid,
            None if reference is None else grid,
            self.transformer.version,
            device,
        )
        repeats = 2 if is_guided(guidance) else 1

        def velocity(tokens: Tensor, time: float) -> Tensor:
            inputs = tokens if reference is None else torch.cat([tokens, reference], 1)
            answer = self.transformer(
                hidden_states=inputs.to(dtype).repeat(repeats, 1, 1),
                encoder_hidden_states=features.features.to(dtype),
                prompt_embeds_mask=features.mask,
                timestep=torch.full((len(inputs) * repeats,), time, device=device),
                img_ids=img_ids,
                txt_ids=txt_ids,
                return_dict=False,
            )[0][:, : tokens.shape[1]].float()
            if repeats == 1:
                return answer
            conditional, unconditional = answer.chunk(2)
            return guided_velocity(conditional, unconditional, guidance, time)

        with cast("Any", self).progress_bar(total=num_steps) as bar:  # its decorator hides it

            def on_step(step: int, time: float, tokens: Tensor) -> Tensor | None:
                bar.update()
                changed = callback(self, step, time, {"latents": tokens}) if callback else None
                return (changed or {}).get("latents")

            times = schedule(num_steps, noise.shape[1], self.config["time_shift"])
            tokens = euler_sample(velocity, noise, times, on_step)
        threshold = self.config["keep_threshold"]
        return tokens if reference is None else keep_reference(tokens, reference, threshold)

    def decode(self, tokens: list[Tensor], rows: list[Row], output_type: str) -> Any:
        """Tokens → pictures of the wanted form; tensors of one size are stacked."""
        if output_type == "latent":
            return tokens
        pictures = []
        with in_float32(self.vae):
            for row_tokens, row in zip(tokens, rows, strict=True):
                width, height = row.size
                pictures.append(
                    decode_tokens(self.vae, row_tokens[None].float(), height, width).clamp(-1, 1)
                )
        finish = cast("Any", self.image_processor.postprocess)
        finished = [finish(picture, output_type)[0] for picture in pictures]
        one_size = len({row.size for row in rows}) == 1
        return torch.stack(finished) if output_type == "pt" and one_size else finished
