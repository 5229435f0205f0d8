"""torch modules on a running cluster: deployed, and asked with tensors."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import torch
from oracle import assert_exact
from test_torch import IMAGE, Calls, Exits, Upscaler, branches, close

import meshinfer as mi


@pytest.fixture(scope="module")
def cluster() -> Iterator[mi.LocalCluster]:
    with mi.LocalCluster(3) as made:
        yield made


def test_a_module_is_deployed_and_takes_tensors(cluster: mi.LocalCluster) -> None:
    module, scale = Exits(), torch.tensor(0.25, requires_grad=True)
    with cluster.client() as client:
        made = client.deploy("exits", module, example=(IMAGE, scale), spread=True)
        assert made.plan is not None and made.plan.count("worker-") > 3
        result = client.infer("exits", {"image": IMAGE, "scale": scale})
    close(result.outputs, module.eval()(IMAGE, scale))
    arrays = {"image": IMAGE.numpy(), "scale": scale.detach().numpy()}
    assert_exact(mi.from_torch(module, (IMAGE, scale)), arrays, result.outputs)


def test_one_tensor_goes_to_the_only_input_whatever_its_history(cluster: mi.LocalCluster) -> None:
    module = Upscaler()
    with cluster.client() as client:
        client.deploy("up", module, example=IMAGE)
        for tensor in (IMAGE, IMAGE.clone().requires_grad_(), IMAGE.transpose(2, 3)):
            result = client.infer("up", tensor)
            close(result.outputs, {"output": module.eval()(tensor)})
        with pytest.raises(mi.InvalidInput, match="BFloat16"):
            client.infer("up", IMAGE.bfloat16())


def test_a_module_with_free_axes_serves_each_shape(cluster: mi.LocalCluster) -> None:
    module = Upscaler()
    shapes = {"image": (1, 3, None, None)}

    async def use() -> None:
        async with mi.AsyncClient(
            cluster.address, keyring=cluster.keyring, cluster=cluster.cluster
        ) as client:
            made = await client.deploy("free", module, example=IMAGE, shapes=shapes)
            assert made.plan is None and made.report is None
            for rows in (16, 20):
                tensor = torch.rand(1, 3, rows, 24)
                result = await client.infer("free", tensor)
                close(result.outputs, {"output": module.eval()(tensor)})

    asyncio.run(use())


def test_what_cannot_be_exported_is_not_deployed(cluster: mi.LocalCluster) -> None:
    with cluster.client() as client:
        with pytest.raises(mi.InvalidInput, match="the branch"):
            client.deploy("bad", Calls(branches), example=IMAGE)
        with pytest.raises(mi.InvalidInput, match="without an example"):
            client.deploy("bad", Exits())
        assert "bad" not in {info.name for info in client.models()}
