"""Plans and profiles: YAML files of the operator's, as frozen models.

    file -> loader (lines, traps) -> model (fields, units) -> Plan / Profile
                                 \\-> problems -> PlanError / ProfileError

Loading touches nothing but the files it reads.
"""

from qpostcopy.config.plan import (
    Lanes,
    Limits,
    Plan,
    Precopy,
    SidePlan,
    SourcePlan,
    SwitchWhen,
    load_plan,
)
from qpostcopy.config.problems import ConfigError, PlanError, Problem, ProfileError
from qpostcopy.config.profile import (
    MAX_AROUND_BYTES,
    FaultPolicy,
    Profile,
    RangeStep,
    SequentialStep,
    Step,
    TraceStep,
    load_profile,
    shipped_profiles,
)

__all__ = [
    "MAX_AROUND_BYTES",
    "ConfigError",
    "FaultPolicy",
    "Lanes",
    "Limits",
    "Plan",
    "PlanError",
    "Precopy",
    "Problem",
    "Profile",
    "ProfileError",
    "RangeStep",
    "SequentialStep",
    "SidePlan",
    "SourcePlan",
    "Step",
    "SwitchWhen",
    "TraceStep",
    "load_plan",
    "load_profile",
    "shipped_profiles",
]
