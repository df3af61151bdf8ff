"""Editing by transformation of parameters: interventions, edits of facts, patches, measures."""

from typing import TYPE_CHECKING

from jaxneurons.lazy import face

if TYPE_CHECKING:
    from jaxneurons.edit.adapter import (
        write_adapter,
    )
    from jaxneurons.edit.agreement import agreement_table, attribution_by_layer
    from jaxneurons.edit.applying import (
        Conflict,
        apply_patches,
        conflicts,
    )
    from jaxneurons.edit.cases import (
        MeasureSettings,
    )
    from jaxneurons.edit.changes import (
        LowRank,
        Multipliers,
        Rows,
        apply,
    )
    from jaxneurons.edit.constants import (
        force,
        with_biases,
    )
    from jaxneurons.edit.covariance import (
        Covariance,
        SingularCovarianceWarning,
        check_covariance,
        collect_covariance,
        read_covariances,
        regularise,
        write_covariances,
    )
    from jaxneurons.edit.differences import (
        diff,
    )
    from jaxneurons.edit.editing import (
        edit,
        edit_each,
        layers_of,
        values_of,
    )
    from jaxneurons.edit.encoding import (
        EncodedRequest,
        encode_prefixed,
        encode_request,
    )
    from jaxneurons.edit.evaluation import (
        evaluate,
    )
    from jaxneurons.edit.interventions import (
        ablate,
        add,
        interpolate,
        restore,
        scale,
        scale_at,
        set_rows,
        sparse_scales,
        swap,
    )
    from jaxneurons.edit.layers import (
        LayerChoice,
        choose_layers,
    )
    from jaxneurons.edit.located import locate_neurons
    from jaxneurons.edit.measures import (
        measure,
    )
    from jaxneurons.edit.method import (
        MEMIT,
        ROME,
        AlphaEdit,
        Edit,
        FineTune,
        KnowledgeNeurons,
        LearnedNeurons,
        Optimisation,
        Trace,
    )
    from jaxneurons.edit.method_names import named_methods
    from jaxneurons.edit.patch import (
        Patch,
        make_patch,
    )
    from jaxneurons.edit.patch_file import (
        read_patch,
        write_patch,
    )
    from jaxneurons.edit.prefixes import (
        generate_prefixes,
    )
    from jaxneurons.edit.request_files import (
        read_known,
        read_requests,
    )
    from jaxneurons.edit.requests import (
        EditRequest,
        KnownFact,
        check_requests,
    )
    from jaxneurons.edit.restoring import (
        restored_probabilities,
    )
    from jaxneurons.edit.reverting import (
        revert,
    )
    from jaxneurons.edit.sequential import (
        evaluate_sequential,
    )
    from jaxneurons.edit.texts import (
        held_out_text,
        lab_text,
        neutral_text,
        sample_text,
    )
    from jaxneurons.edit.tracing import (
        answered,
        trace,
    )
    from jaxneurons.edit.values import (
        Values,
    )
    from jaxneurons.edit.world_requests import (
        lab_requests,
    )

__getattr__, __dir__ = face(__name__, __file__)

__all__ = [
    "MEMIT",
    "ROME",
    "AlphaEdit",
    "Conflict",
    "Covariance",
    "Edit",
    "EditRequest",
    "EncodedRequest",
    "FineTune",
    "KnowledgeNeurons",
    "KnownFact",
    "LayerChoice",
    "LearnedNeurons",
    "LowRank",
    "MeasureSettings",
    "Multipliers",
    "Optimisation",
    "Patch",
    "Rows",
    "SingularCovarianceWarning",
    "Trace",
    "Values",
    "ablate",
    "add",
    "agreement_table",
    "answered",
    "apply",
    "apply_patches",
    "attribution_by_layer",
    "check_covariance",
    "check_requests",
    "choose_layers",
    "collect_covariance",
    "conflicts",
    "diff",
    "edit",
    "edit_each",
    "encode_prefixed",
    "encode_request",
    "evaluate",
    "evaluate_sequential",
    "force",
    "generate_prefixes",
    "held_out_text",
    "interpolate",
    "lab_requests",
    "lab_text",
    "layers_of",
    "locate_neurons",
    "make_patch",
    "measure",
    "named_methods",
    "neutral_text",
    "read_covariances",
    "read_known",
    "read_patch",
    "read_requests",
    "regularise",
    "restore",
    "restored_probabilities",
    "revert",
    "sample_text",
    "scale",
    "scale_at",
    "set_rows",
    "sparse_scales",
    "swap",
    "trace",
    "values_of",
    "with_biases",
    "write_adapter",
    "write_covariances",
    "write_patch",
]
