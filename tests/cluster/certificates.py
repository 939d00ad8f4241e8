"""Keys, certificates and kubeconfigs: one authority signs for every component. Made with the openssl program."""

import base64
import json
from pathlib import Path

from cluster.host import run
from cluster.layout import API_SERVICE_ADDRESS, API_URL, CLUSTER_DOMAIN, CONTROL, KUBECONFIG, NODES, RUN
from cluster.packages import program

FOLDER = RUN / "pki"
AUTHORITY = FOLDER / "ca.crt"
AUTHORITY_KEY = FOLDER / "ca.key"
SERVICE_ACCOUNT_KEY = FOLDER / "service-account.key"
SERVICE_ACCOUNT_PUBLIC_KEY = FOLDER / "service-account.pub"

ADMIN = "admin"
# Names that RBAC's built-in roles and the node authorizer know; `O` is the group.
SUBJECTS = {
    ADMIN: "/O=system:masters/CN=headrace-admin",
    "kube-apiserver-kubelet-client": "/O=system:masters/CN=kube-apiserver-kubelet-client",
    "kube-controller-manager": "/CN=system:kube-controller-manager",
    "kube-scheduler": "/CN=system:kube-scheduler",
    "kube-proxy": "/CN=system:kube-proxy",
    "coredns": "/CN=system:coredns",
    **{node.name: f"/O=system:nodes/CN=system:node:{node.name}" for node in NODES},
}
CLIENTS_WITHOUT_KUBECONFIG = {"kube-apiserver-kubelet-client"}


def create() -> None:
    """Write the whole key infrastructure and a kubeconfig for each client."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    create_authority()
    create_service_account_keys()
    create_certificate("kube-apiserver", "/CN=kube-apiserver", f"subjectAltName={api_server_names()}")
    for name, subject in SUBJECTS.items():
        create_certificate(name, subject, "extendedKeyUsage=clientAuth")
    for name in SUBJECTS.keys() - CLIENTS_WITHOUT_KUBECONFIG:
        write_kubeconfig(name, kubeconfig(name))
    write_private(KUBECONFIG, kubeconfig(ADMIN).read_text())


def certificate(name: str) -> Path:
    return FOLDER / f"{name}.crt"


def key(name: str) -> Path:
    return FOLDER / f"{name}.key"


def kubeconfig(name: str) -> Path:
    return FOLDER / f"{name}.kubeconfig"


def api_server_names() -> str:
    names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", f"kubernetes.default.svc.{CLUSTER_DOMAIN}"]
    addresses = [CONTROL.address, API_SERVICE_ADDRESS, "127.0.0.1"]
    return ",".join([f"DNS:{name}" for name in ["localhost", *names]] + [f"IP:{address}" for address in addresses])


def create_authority() -> None:
    openssl_request(AUTHORITY, AUTHORITY_KEY, "/CN=headrace-test-ca", "keyUsage=critical,keyCertSign,digitalSignature")


def create_certificate(name: str, subject: str, extension: str) -> None:
    signer = ["-CA", str(AUTHORITY), "-CAkey", str(AUTHORITY_KEY), "-addext", "basicConstraints=critical,CA:FALSE"]
    openssl_request(certificate(name), key(name), subject, extension, *signer)


def openssl_request(out: Path, out_key: Path, subject: str, extension: str, *more: str) -> None:
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    common = [*curve, "-days", "365", "-subj", subject, "-addext", extension, "-out", str(out), "-keyout", str(out_key)]
    run([program("openssl"), "req", "-x509", *common, *more])


def create_service_account_keys() -> None:
    """The pair that signs and checks ServiceAccount tokens."""
    run([program("openssl"), "genrsa", "-out", SERVICE_ACCOUNT_KEY, "2048"])
    run([program("openssl"), "rsa", "-in", SERVICE_ACCOUNT_KEY, "-pubout", "-out", SERVICE_ACCOUNT_PUBLIC_KEY])


def write_kubeconfig(name: str, path: Path) -> None:
    """A kubeconfig as JSON (which is YAML); certificates are embedded, so that the file can be copied."""
    cluster = {"server": API_URL, "certificate-authority-data": base64_of(AUTHORITY)}
    user = {"client-certificate-data": base64_of(certificate(name)), "client-key-data": base64_of(key(name))}
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "headrace-test", "cluster": cluster}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": "headrace-test", "context": {"cluster": "headrace-test", "user": name}}],
        "current-context": "headrace-test",
    }
    write_private(path, json.dumps(document, indent=2))


def base64_of(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, from its first byte on."""
    path.unlink(missing_ok=True)
    path.touch(mode=0o600, exist_ok=False)
    path.write_text(text)
